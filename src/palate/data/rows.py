"""Rows of a data source, each with its place in the source for messages.

Sources are tried in this order:
1. `everyday`, the prompts that come with the package;
2. the disk: a folder saved by `datasets` or with data files in it, or a file with a known suffix;
3. `owner/name` or `owner/name:configuration`, a data set on the hub.
A name that is not on disk counts as a path if it has a suffix of data files, starts with `.`, `/` or `~`, or
is not of the form `owner/name`; otherwise it is a name on the hub.
Nothing here unpickles.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from palate.data.account import RowError
from palate.data.hubs import hub_rows, saved_rows
from palate.data.row import Row, near
from palate.data.tables import parquet_rows, refuse_utf16, text_rows
from palate.errors import DataError
from palate.given import GivenRows

BUILT_IN = "everyday"
"""Name of the data set inside the package."""

_JSON = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
_READ = (*_JSON, ".parquet", *_TABLES)
_NOT_READ = (".txt", ".md", ".yaml", ".yml", ".arrow", ".feather", ".xlsx", ".pkl", ".pickle",
             ".pt", ".npz", ".db", ".zip", ".gz", ".tar", ".tgz", ".bz2", ".xz", ".zst")  # fmt: skip
_KINDS = ", ".join(_READ)
_HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?::(?P<config>[\w.+-]+))?")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""The escape of half a surrogate pair in JSON."""
_HUB_CONFIG = re.compile(r"([A-Za-z0-9_][\w-]*/[\w.-]+)[/@]([\w.+-]+)")


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> Iterator[Row]:
    """Yield at most `limit` rows of a source in their order; files are read only as far as needed.

    Raises DataError as `scan_rows` does, and also for a row that cannot be read.
    """
    return (_sound(row) for row in _first_sound(scan_rows(source, split=split, limit=limit)))


def _first_sound(rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows)
    return chain((_sound(first),), rows)


def _sound(row: Row) -> Row:
    if row.fault is not None:
        raise row.fault
    return row


def scan_rows(source: str, *, split: str = "train", limit: int | None = None) -> Iterator[Row]:
    """Yield the rows of a source in their order; a row that cannot be read has a `fault`.

    `split` is for sources that have splits (`everyday`, a saved `DatasetDict`, the hub); files ignore it.
    Blank lines of a JSON Lines file are skipped, but counted.

    Raises DataError if the source cannot be found or read, has no rows, or lacks the split: at once if the
    first row shows the error, otherwise while iterating.
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


def _open(source: str, split: str) -> Iterator[Row]:
    if isinstance(source, GivenRows):
        return _given(source, split)
    if source == BUILT_IN:
        return _built_in(split)
    path = Path(source).expanduser()
    name = path.name.lower()
    folder, config = _configured(path)
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise DataError(f"{source} is an empty folder; expected data files in it.")
        return saved_rows(folder, source, config, split)
    if name.endswith(_READ):
        if not path.exists():
            raise DataError(f"{source} does not exist.{_neighbour(path)}")
        if name.endswith(_TABLES):
            return text_rows(path, source)
        return parquet_rows(path, source) if name.endswith(".parquet") else _json(path, source)
    if path.exists() or name.endswith(_NOT_READ):
        raise DataError(
            f"{source} has an unsupported file type; expected {_KINDS} or a saved `datasets` directory. "
            "Convert it, for example to one JSON object per line in a .jsonl file."
        )
    hub = _HUB_ID.fullmatch(source)
    if hub:
        here = f"It is not on this disk either.{_neighbour(path) if path.parent.is_dir() else ''}"
        return hub_rows(hub["name"], source, hub["config"], split, here)
    other = _HUB_CONFIG.fullmatch(source)
    hint = f" Write a configuration as {other[1]}:{other[2]}." if other else ""
    raise DataError(
        f"{source} does not exist; expected `{BUILT_IN}`, a file ({_KINDS}), a folder of such files or saved "
        f"by `datasets`, or a hub id as owner/name or owner/name:configuration.{hint}"
        f"{_neighbour(path)}{near(source, [BUILT_IN])}"
    )


def _configured(path: Path) -> tuple[Path, str | None]:
    """Return a folder, and the configuration after a colon in its name."""
    if path.is_dir() or ":" not in path.name:
        return path, None
    folder, _, config = str(path).rpartition(":")
    return Path(folder), config


def _neighbour(path: Path) -> str:
    """Return a hint: files beside the missing one, or the missing folder."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir()]
    # Files of the same type are not close to each other because of their suffix.
    alike = [name for name in names if near(_stem(path.name), [_stem(name)])]
    return near(path.name, alike) or _readable(names)


def _stem(name: str) -> str:
    return name.partition(".")[0] or name


def _readable(names: Iterable[str]) -> str:
    files = sorted(name for name in names if name.lower().endswith(_READ))
    return (
        f" Data files in that folder: {', '.join(files[:5])}{', ...' if files[5:] else ''}." if files else ""
    )


def _given(source: GivenRows, split: str) -> Iterator[Row]:
    rows = source.of_split(split)
    if rows is None:
        raise DataError(f"The data have no split '{split}'; they are {source}.")
    for number, value in enumerate(rows, 1):
        where = f"row {number} given in Python"
        yield _checked(dict(value) if isinstance(value, Mapping) else value, where)


def _built_in(split: str) -> Iterator[Row]:
    folder = resources.files("palate.data") / BUILT_IN
    splits = sorted(file.name.removesuffix(".jsonl") for file in folder.iterdir() if ".jsonl" in file.name)
    if split not in splits:
        raise DataError(f"{BUILT_IN} has no split '{split}'; it has {', '.join(splits)}.")
    with (folder / f"{split}.jsonl").open("rb") as file:
        yield from _lines(cast(BinaryIO, file), f"{BUILT_IN}/{split}.jsonl")


def _json(path: Path, source: str) -> Iterator[Row]:
    """Yield rows of a file with one JSON object per line, or with one array of objects."""
    packed = path.name.lower().endswith(".gz")
    lines = path.name.lower().removesuffix(".gz").endswith(".jsonl")
    try:
        refuse_utf16(path, source)
        with gzip.open(path) if packed else path.open("rb") as file:
            head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n")
            file.seek(0)
            # Some programs write one array of objects into a file named .jsonl.
            array = head[:1] == b"[" and not (lines and head[1:].lstrip()[:1] != b"{")
            yield from (_array if array else _lines)(cast(BinaryIO, file), source)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{source} is not a complete gzip file ({error}); copy or compress it again."
        ) from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error


def _lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        where = f"{name}:{number}"
        try:
            text = _decode(line, where)
            if not text.strip():
                continue
            value = _value(text, where, last=not line.endswith(b"\n"))
            row = _row(value, where, plain=_HALF.search(text) is None)
        except RowError as error:
            row = Row({}, where, fault=error)
        yield row


def _value(text: str, where: str, *, last: bool) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        cut = " It is the file's last line, so the file may be incomplete." if last else ""
        what = f"{where} is not JSON ({_reason(error)}); expected one object per line.{cut}"
        raise RowError(what, where, "the line is not JSON") from error


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
    yield from (_checked(value, f"{name} row {number}") for number, value in enumerate(values, 1))


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")  # a byte order mark is harmless; Windows editors write one
    except UnicodeDecodeError as error:
        before = data.count(b"\n", 0, error.start)
        place = f"{where}:{before + 1}" if before else where
        what = f"{place} is not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8."
        raise RowError(what, place, "the line is not UTF-8") from error


def _checked(value: Any, where: str) -> Row:
    """Return the row, or one with a fault."""
    try:
        return _row(value, where)
    except RowError as error:
        return Row({}, where, fault=error)


def _row(value: Any, where: str, *, plain: bool = False) -> Row:
    """Check a value. `plain`: it comes from JSON text without escapes of halves of surrogate pairs."""
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a string", type(None): "null"}.get(type(value))
        kind = kind or ("a number" if isinstance(value, int | float) else f"of type {type(value).__name__}")
        what = f'{where} is {kind}; expected an object such as {{"prompt": "..."}}.'
        raise RowError(what, where, f"the row is {kind}")
    unnamed = next((name for name in value if not isinstance(name, str)), None)
    if unnamed is not None:
        what = f"{where} has a column with the name {unnamed!r}; expected texts as names."
        raise RowError(what, where, "the name of a column is not a text")
    if plain:
        return Row(value, where)
    try:
        # Rows given in Python may have dates or arrays, which reward functions can read.
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # "\ud83d" alone: no tokenizer can take it
        what = f"{where} has half a surrogate pair (\\ud800-\\udfff); write whole characters."
        raise RowError(what, where, "half a surrogate pair") from error
    except (TypeError, ValueError) as error:
        what = f"{where} has a value that contains itself, or a key that is not a text: {error}."
        raise RowError(what, where, "a value that JSON cannot express") from error
    except RecursionError as error:
        what = f"{where} is nested too deeply; expected a few levels."
        raise RowError(what, where, "the row is nested too deeply") from error
    return Row(value, where)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return str(error)
