"""Rows of data in mapped files, so that data larger than memory can be read, and read again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from palate.data.account import Account
from palate.data.identity import key_of_files
from palate.data.plain import Stored, from_json, to_json
from palate.data.shelf import Shelf, ShelfWriter, opened

Progress = Callable[[int], None]
"""Gets the number of rows so far, now and then."""

OFTEN = 512
"""Rows between two reports of progress."""


class StoredRows(Sequence[Stored]):
    """Comparisons or demonstrations without tokens, each read from disk when it is needed.

    Attributes:
        key: a key of all rows and their account.
        lasting: True if another process, and a later start of the run, can read them from the files alone.
            Rows that JSON cannot express, such as those with a column of dates, stay in memory.
    """

    def __init__(self, shelf: Shelf, apart: Mapping[int, Stored]) -> None:
        self._shelf, self._apart = shelf, apart
        self.key: str = shelf.facts["key"]
        self.lasting = not apart

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._shelf.count("rows")

    @overload
    def __getitem__(self, index: int) -> Stored: ...
    @overload
    def __getitem__(self, index: slice) -> list[Stored]: ...
    def __getitem__(self, index: int | slice) -> Stored | list[Stored]:
        """Read a row, or a list of rows."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        row = self._apart.get(index)
        return from_json(self._shelf.get("rows", index).tobytes()) if row is None else row


def store_rows(
    path: Path, rows: Iterable[Stored], account: Account, source: str | None, progress: Progress
) -> StoredRows:
    """Write rows to a shelf.

    Args:
        path: the shelf.
        rows: the rows; iterating over them fills the account.
        account: saved with the rows.
        source: the key of everything that the rows are read from, for `stored_rows`; None if it has none.
        progress: gets the number of rows so far.

    Raises:
        DataError: the rows cannot be used.
        OSError: the shelf cannot be written.
    """
    apart: dict[int, Stored] = {}
    digest = hashlib.blake2b(digest_size=16)
    with ShelfWriter(path, {"rows": "|u1"}) as writer:
        for index, row in enumerate(rows):
            data = to_json(row)
            if data is None:
                apart[index] = row
            writer.add("rows", data or b"")
            digest.update(repr(row).encode("utf-8", "surrogatepass") if data is None else data + b"\n")
            if index % OFTEN == 0:
                progress(index)
        saved = account.saved()
        digest.update(json.dumps(saved).encode("utf-8", "surrogatepass"))
        facts: dict[str, Any] = {"key": digest.hexdigest(), "account": saved}
        writer.finish({**facts, "source": None if apart else source, "lasting": not apart})
    return StoredRows(Shelf(path), apart)


def stored_rows(
    path: Path, account: Account, *, source: str | None = None, key: str | None = None
) -> StoredRows | None:
    """Return the rows of a shelf and restore their account; None if it is missing, damaged or of other data.

    Args:
        path: the shelf.
        account: restored.
        source: the key that `store_rows` got.
        key: the key of the rows, instead.
    """
    shelf = opened(path)
    if shelf is None or not shelf.facts.get("lasting") or (source is None and key is None):
        return None
    if (key is not None and shelf.facts["key"] != key) or (source and shelf.facts["source"] != source):
        return None
    account.restore(shelf.facts["account"])
    return StoredRows(shelf, {})


def source_key(source: str, *parts: Any) -> str | None:
    """Return a key of a file or folder by its content and of `parts`, JSON values; None for other sources."""
    content = key_of_files(source)
    if content is None:
        return None
    return hashlib.blake2b(json.dumps([content, *parts]).encode(), digest_size=16).hexdigest()
