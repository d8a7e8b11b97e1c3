"""A run's rows and their tokens in files of its directory, which are mapped into memory.

Process 0 writes them, and the other processes on the machine map the same files. A run that resumes maps them
again if nothing changed that they depend on. A batch reads only its own records, so data may be larger than
memory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from palate.data import Account, StoredRows
from palate.data.account import Tally
from palate.data.plain import Stored
from palate.data.shelf import Shelf, ShelfWriter, described, opened
from palate.data.stored import Progress, source_key, store_rows, stored_rows
from palate.errors import AGAIN, DataError, RunError
from palate.journal import key_of
from palate.model.codec import Codec
from palate.run import Run
from palate.select import same
from palate.types import Comparison, Completion, Content, Example, Pair, Prompt, said

FORMAT = 2
"""Version of the files and of the rules by which rows become tokens; a change makes old files unused."""

REPEATED = "rows repeat an earlier row"
"""The note on rows that are learnt from more than once in an epoch."""
CUT_EQUAL = "chosen and rejected are the same, cut to the model's context"
"""The reason for leaving out pairs whose completions are equal."""

FOLDER = "prepared"
"""The directory of the files in a run's directory, until the run is finished."""

EVERY = 20.0
"""Seconds between two lines on progress in a log."""

R = TypeVar("R", Pair, Example)
T = TypeVar("T")


class Records(Sequence[R], Generic[R]):
    """Pairs or examples in tokens, each read from disk when it is needed.

    Attributes:
        key: a key of the contents of all records, including the columns that a reward may read.
        prompts_key: a key of the tokens of all prompts.
    """

    def __init__(self, rows: Sequence[Stored], shelf: Shelf) -> None:
        self._rows, self._shelf = rows, shelf
        self.key: str = shelf.facts["key"]
        self.prompts_key: str = shelf.facts["prompts_key"]

    def __len__(self) -> int:
        """Return the number of records."""
        return self._shelf.count("facts")

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        """Read a record, or a list of records."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        number, *answers = json.loads(self._shelf.get("facts", index).tobytes())
        row = self._rows[number]
        width = len(answers) + 1
        ids, *tokens = (tuple(self._shelf.get("tokens", index * width + i).tolist()) for i in range(width))
        prompt = replace(row.prompt, token_ids=ids)
        completions = [
            Completion(_words(content) if text is None else text, own, finish)
            for (finish, text), content, own in zip(answers, _answers(row), tokens, strict=True)
        ]
        if isinstance(row, Comparison):
            return Pair(prompt, completions[0], completions[1], row.margin)  # type: ignore[return-value]
        return Example(prompt, completions[0])  # type: ignore[return-value]


class Mapped(Sequence[T]):
    """A function of each item of a sequence, computed when it is needed."""

    def __init__(self, items: Sequence[Any], function: Callable[[Any], T]) -> None:
        self._items, self._function = items, function

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        """Compute the value of an item, or a list of values."""
        if isinstance(index, slice):
            return [self._function(item) for item in self._items[index]]
        return self._function(self._items[index])


def prompts_of(records: Sequence[Pair | Example]) -> Sequence[Prompt]:
    """Return the prompts of records as sampling starts from them."""
    return Mapped(records, lambda record: record.prompt.to_sample())


# ---- Rows ------------------------------------------------------------------------------------------


def rows_on_disk(
    run: Run,
    scan: Callable[..., Iterator[Stored]],
    source: str,
    account: Account,
    **options: Any,
) -> StoredRows:
    """Return the rows of a data set, from files in the run's directory.

    Args:
        run: the run.
        scan: `scan_comparisons` or `scan_demonstrations`.
        source: the data set.
        account: filled.
        options: of `scan`, as JSON values.

    Raises:
        DataError: the data cannot be used.
        RunError: the files cannot be written, or the processes see different files.
    """
    facts = [FORMAT, scan.__name__, options, account.strict, account.max_bad_rows]
    name = f"rows-{key_of(source, *facts)[:16]}"
    key = source_key(source, *facts)
    run.world.agree("the data", key or "")

    def write(place: Path) -> StoredRows:
        rows = scan(source, account=account, **options)
        return store_rows(place, rows, account, key, _progress(run, source, "read"))

    reuse = partial(stored_rows, account=account)
    return _shared(run, name, lambda place: reuse(place, source=key), write, reuse)


def records_on_disk(run: Run, codec: Codec, rows: StoredRows, source: str, account: Account) -> Records[Any]:
    """Return rows in the codec's tokens, from files in the run's directory: a `Pair` or `Example` each.

    Rows that cannot be used are skipped and counted; pairs that become equal when cut are left out.

    Raises:
        DataError: no row is left, or too many cannot be used; the message names `source`.
        RunError: the files cannot be written.
    """
    name = f"tokens-{key_of(source, codec.end_id)[:16]}"
    depends = key_of(FORMAT, rows.key, codec.identity)

    def reuse(place: Path, key: str | None = None) -> Records[Any] | None:
        shelf = opened(place)
        if shelf is None or not rows.lasting or shelf.facts.get("depends") != depends:
            return None
        if key is not None and shelf.facts["key"] != key:
            return None
        account.restore(shelf.facts["account"], shelf.get("lengths", 0).tobytes())
        return Records(rows, shelf)

    def write(place: Path) -> Records[Any]:
        _write_records(place, codec, rows, source, account, depends, _progress(run, source, "tokenised"))
        return Records(rows, Shelf(place))

    return _shared(run, name, reuse, write, reuse)


def forget_prepared(run: Run) -> None:
    """Delete the files, since a finished run does not need them."""
    if run.world.leads:
        shutil.rmtree(run.directory / FOLDER, ignore_errors=True)


def _write_records(
    place: Path,
    codec: Codec,
    rows: StoredRows,
    source: str,
    account: Account,
    depends: str,
    progress: Progress,
) -> None:
    codec.account = account
    content, prompts = (hashlib.blake2b(digest_size=16) for _ in range(2))
    repeats, kept, number = Repeats(), 0, -1
    with ShelfWriter(place, {"tokens": "=i4", "facts": "|u1", "lengths": "=i4"}) as writer:
        for block in codec.in_blocks(rows):
            progress(number + 1)
            for row in block:
                number += 1
                try:
                    record = codec.pair(row) if isinstance(row, Comparison) else codec.example(row)
                    tokens = [codec.prompt_ids(record.prompt), *(c.token_ids for c in record.completions)]
                except DataError as error:
                    account.skip(error)
                    continue
                account.lengths.append(len(tokens[0]) + max(map(len, tokens[1:])))
                packed = [array("i", ids).tobytes() for ids in tokens]
                key = _digest(record.prompt.id, packed[1:])
                repeats.add(number, key)
                if isinstance(record, Pair) and same(record.chosen, record.rejected):
                    account.drop(CUT_EQUAL)
                    continue
                kept += 1
                content.update(key)
                content.update(key_of(dict(record.prompt.columns), getattr(record, "margin", None)).encode())
                prompts.update(packed[0] + b"\0")
                for values in packed:
                    writer.add("tokens", values)
                writer.add("facts", json.dumps(_facts(number, row, record)).encode())
        account.check(source, len(account.lengths))
        if (tally := repeats.tally(rows)) is not None:
            account.notes[REPEATED] = tally
        if not kept:
            raise DataError(
                f"{source}: after truncation to the model's context, chosen and rejected are the same in "
                "every pair; use shorter texts or a larger --max-length"
            )
        writer.add("lengths", account.lengths.tobytes())
        writer.finish(
            {
                "depends": depends,
                "key": content.hexdigest(),
                "prompts_key": prompts.hexdigest(),
                "account": account.saved(),
            }
        )


class Repeats:
    """Counts rows that repeat an earlier one, from 12 bytes per row."""

    def __init__(self) -> None:
        self._numbers, self._keys = array("i"), array("Q")

    def add(self, number: int, key: bytes) -> None:
        """Note a row by its number, with a key of its contents. 8 of its bytes distinguish rows."""
        self._numbers.append(number)
        self._keys.append(int.from_bytes(key[:8], "little"))

    def tally(self, rows: Sequence[Stored]) -> Tally | None:
        """Return the number of repeats with the first and the last of them; None if there are none."""
        keys = np.asarray(self._keys)
        order = np.argsort(keys, kind="stable")  # of equal keys, the earlier row comes first
        repeats = order[1:][keys[order[1:]] == keys[order[:-1]]]
        if len(repeats) == 0:
            return None
        first, last = (rows[self._numbers[int(i)]].prompt.where for i in (repeats.min(), repeats.max()))
        return Tally(len(repeats), first, last)


def _facts(number: int, row: Stored, record: Pair | Example) -> list[Any]:
    """Return the parts of a record that are neither in its row nor tokens."""
    both = zip(record.completions, _answers(row), strict=True)
    return [number, *([c.finish, None if c.text == _words(text) else c.text] for c, text in both)]


def _answers(row: Stored) -> tuple[Content, ...]:
    return (row.chosen, row.rejected) if isinstance(row, Comparison) else (row.completion,)


def _words(content: Content) -> str:
    return content if isinstance(content, str) else said(content[0])


def _digest(prompt: str, packed: Sequence[bytes]) -> bytes:
    lengths = ",".join(str(len(values)) for values in packed)
    return hashlib.blake2b(b"".join((prompt.encode(), lengths.encode(), *packed)), digest_size=16).digest()


# ---- Processes and files ---------------------------------------------------------------------------


K = TypeVar("K", StoredRows, Records[Any])


def _shared(
    run: Run,
    name: str,
    reuse: Callable[[Path], K | None],
    write: Callable[[Path], K],
    mapped: Callable[..., K | None],
) -> K:
    """Let process 0 reuse or write a shelf, and the others map it; one that cannot see it writes its own."""
    folder = run.directory / FOLDER
    own: list[K] = []

    def prepare() -> str:
        with _explained(folder, name):
            own.append(reuse(folder / name) or write(folder / name))
        return own[0].key

    key = run.world.lead(f"prepare {name}", prepare)
    if own:
        return own[0]
    there = mapped(folder / name, key=key)
    if there is not None:
        return there
    private = Path(tempfile.mkdtemp(prefix="palate-"))
    with _explained(private, name):
        made = write(private / name)
    weakref.finalize(made, shutil.rmtree, private, ignore_errors=True)
    return made


@contextmanager
def _explained(folder: Path, name: str) -> Iterator[None]:
    """Turn an error in writing into one that says what to do, and leave no partial files."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"the prepared data cannot be written to {str(folder)!r}: {error.strerror or error}; they need "
            f"about twice the space of the data; free some space, then {AGAIN}, or use another --output"
        ) from error
    finally:
        if not described(folder / name).exists():
            for file in folder.glob(f"{name}.*"):
                file.unlink(missing_ok=True)


def _progress(run: Run, source: str, done: str) -> Progress:
    """Return a function that shows the number of rows so far."""
    last = time.monotonic()

    def show(count: int) -> None:
        nonlocal last
        run.display.working(f"{done} {count:,} rows of {source}", 0.0)
        if time.monotonic() - last > EVERY:
            last = time.monotonic()
            if not run.display.console.is_terminal:
                run.display.say(f"{source}: {count:,} rows {done}")

    return show
