"""Rows of a data source, each with the place it came from, so that every later message can name it.

Sources are tried in this order:
1. `everyday`, the prompts that come with the package;
2. what is on disk: a directory saved by `datasets`, or a file of a suffix that is read;
3. `owner/name`, a data set on the hub.
Whether a name that is not on disk means a file or the hub is read off the name alone: it is a path if
it has a suffix of data files, starts with `.`, `/` or `~`, or is not of the form `owner/name`.
Nothing here unpickles.
"""

from __future__ import annotations

import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from palate.errors import DataError
from palate.given import GivenRows

BUILT_IN = "everyday"
"""Name of the data set inside the package."""

_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_READ = (*_JSON, ".parquet")
_NOT_READ = (".csv", ".tsv", ".txt", ".md", ".yaml", ".yml", ".arrow", ".feather", ".xlsx", ".pkl", ".pickle",
             ".pt", ".npz", ".db", ".zip", ".gz", ".tar", ".tgz", ".bz2", ".xz", ".zst")  # fmt: skip
_KINDS = ", ".join(_READ)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Row:
    """One row of data."""

    columns: Mapping[str, Any]
    where: str
    """For messages: `prefs.jsonl:12`, `prefs.parquet row 7`, `owner/name[train] row 3`; all count from 1."""


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> Iterator[Row]:
    """The rows of a source in their order, at most `limit` of them; files are read as far as needed.

    `split` is for sources that have splits (`everyday`, a saved `DatasetDict`, the hub); a file has none
    and ignores it. Blank lines of a JSON Lines file are skipped, but counted.

    Raises DataError if the source cannot be found or read, has no rows, or lacks the split: at once for
    what the first row shows, while iterating for a row further on.
    """
    assert limit is None or limit >= 1, "a limit is at least 1"
    try:
        rows = islice(_open(source, split), limit)
    except OSError as error:  # a folder that may not be entered, a name longer than names can be
        raise DataError(f"{source[:200]} cannot be looked up: {error.strerror}.") from error
    first = next(rows, None)
    if first is None:
        raise DataError(f"{source} has no rows; expected at least one.")
    return chain((first,), rows)


def near(name: str, names: Iterable[str]) -> str:
    """` Did you mean X?` where one of the names is close to this one, else nothing."""
    found = difflib.get_close_matches(name, sorted(set(names)), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _open(source: str, split: str) -> Iterator[Row]:
    if isinstance(source, GivenRows):
        return _given(source, split)
    if source == BUILT_IN:
        return _built_in(split)
    path = Path(source).expanduser()
    name = path.name.lower()
    if path.is_dir():
        return _saved(path, source, split)
    if name.endswith(_READ):
        if not path.exists():
            raise DataError(f"{source} does not exist.{_neighbour(path)}")
        return _parquet(path, source) if name.endswith(".parquet") else _json(path, source)
    if path.exists() or name.endswith(_NOT_READ):
        raise DataError(
            f"{source} is of a kind that is not read; expected {_KINDS} or a saved `datasets` directory. "
            "Convert it, for example to one JSON object per line in a .jsonl file."
        )
    if _HUB_ID.fullmatch(source):
        return _hub(path, source, split)
    raise DataError(
        f"{source} does not exist; expected `{BUILT_IN}`, a file ({_KINDS}), a saved `datasets` directory, "
        f"or a hub id as owner/name.{_neighbour(path)}{near(source, [BUILT_IN])}"
    )


def _neighbour(path: Path) -> str:
    """A hint at a file beside the missing one, or at the folder that is missing itself."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either."
    names = [entry.name for entry in path.parent.iterdir()]
    return near(path.name, names) or _readable(names)


def _readable(names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.lower().endswith(_READ))
    return f" In that folder there is {', '.join(files[:5])}{', ...' if files[5:] else ''}." if files else ""


def _given(source: GivenRows, split: str) -> Iterator[Row]:
    rows = source.of_split(split)
    if rows is None:
        raise DataError(f"The data have no split '{split}'; they are {source}.")
    for number, value in enumerate(rows, 1):
        where = f"row {number} given in Python"
        columns = dict(value) if isinstance(value, Mapping) else value
        try:
            row = _row(columns, where)
        except (
            TypeError
        ):  # a column of dates or arrays, which JSON cannot write; reward functions may read it
            row = Row(columns, where)
        yield row


def _built_in(split: str) -> Iterator[Row]:
    folder = resources.files("palate.data") / BUILT_IN
    splits = sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if ".jsonl" in file.name)
    if split not in splits:
        raise DataError(f"{BUILT_IN} has no split '{split}'; it has {', '.join(splits)}.")
    with (folder / f"{split}.jsonl").open("rb") as file:
        yield from _lines(cast(BinaryIO, file), f"{BUILT_IN}/{split}.jsonl")


def _json(path: Path, source: str) -> Iterator[Row]:
    """Rows of a JSON Lines file, or of a `.json` file that is one array of objects."""
    packed = path.name.lower().endswith(".gz")
    array = not path.name.lower().removesuffix(".gz").endswith(".jsonl")
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
            yield from (_array if array and head[:1] == b"[" else _lines)(cast(BinaryIO, file), source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{source} is no whole gzip file ({error}); copy or compress it again.") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        text = _decode(line, where)
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            cut = "" if line.endswith(b"\n") else " It is the file's last line: is the file cut off?"
            raise DataError(
                f"{where} is not JSON ({_reason(error)}); expected one object per line.{cut}"
            ) from error
        yield _row(value, where)


def _array(file: BinaryIO, name: str) -> Iterator[Row]:
    text = _decode(file.read(), name)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno} is not JSON ({_reason(error)}); expected one array of objects."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} is not JSON ({error}); expected one array of objects.") from error
    for number, value in enumerate(values, 1):
        yield _row(value, f"{name} row {number}")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is harmless; Windows editors write one
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        place = f"{where}:{before + 1}" if before else where
        raise DataError(
            f"{place} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8."
        ) from error


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value), "a number")
        raise DataError(f'{where} is {kind}; expected an object such as {{"prompt": "..."}}.')
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone: no tokenizer can take it
        raise DataError(
            f"{where} has half a surrogate pair (\\ud800-\\udfff); write whole characters."
        ) from error
    return Row(value, where)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)


def _parquet(path: Path, source: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(columns, f"{source} row {number}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"{source} cannot be read as Parquet{place} ({_line(error)}); write or copy it again."
        ) from error


def _saved(path: Path, source: str, split: str) -> Iterator[Row]:
    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{source} is a directory that `datasets` did not save (save_to_disk); name a file instead."
            f"{_readable(entry.name for entry in path.iterdir())}"
        )

    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source} is a damaged saved data set ({_line(error)}); save it again.") from error
    if isinstance(data, datasets.Dataset):
        return _numbered(data, source)
    if split not in data:
        raise DataError(f"{source} has no split '{split}'; it has {', '.join(data)}.")
    return _numbered(data[split], f"{source}[{split}]")


def _hub(path: Path, source: str, split: str) -> Iterator[Row]:
    import datasets

    here = f"It is not on this disk either.{_neighbour(path) if path.parent.is_dir() else ''}"
    try:
        data = datasets.load_dataset(source, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"The hub has no data set {source}, or it is private (then log in with: hf auth login). {here}"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"The hub cannot be reached for {source} ({_line(error)}); go online, or name a file. {here}"
        ) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}[{split}] cannot be loaded from the hub: {_line(error)} "
            "Choose another --split, or download a file of it and name that."
        ) from error
    return _numbered(data, f"{source}[{split}]")


def _numbered(data: Any, name: str) -> Iterator[Row]:
    """Rows of a `datasets.Dataset` as plain Python, whatever format (torch, numpy) was saved with it."""
    return (Row(columns, f"{name} row {number}") for number, columns in enumerate(data.with_format(None), 1))


def _line(error: Exception) -> str:
    """The first line of another library's message."""
    return str(error).strip().partition("\n")[0]
