"""Write rows to a file atomically: the file is either complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096
"""Rows of a Parquet file with given types that are in memory at once."""

Rows = Iterator[Mapping[str, Any]]
Types = Mapping[str, "pa.DataType"]
"""Arrow types by column."""


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], types: Types | None = None) -> None:
    """Write rows to a .jsonl or .parquet file under the column names they have.

    The file appears under its name only when it is complete, and replaces an existing one; chat turns
    may be tuples or any mappings. Parquet gets the columns of all rows, empty where a row lacks one; their
    types follow from all rows, which are in memory together. With `types` it gets these columns, and any
    number of rows needs little memory, as in .jsonl.

    Raises DataError if the suffix is not supported, there are no rows, a row cannot be written in the format,
    or the folder is missing or not writable.
    """
    path = Path(path)
    write = check_target(path)
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{path} is not written: there are no rows; expected at least one.")
    _replace(path, map(_plain, chain([first], rows)), write, types)


Write = Callable[[Path, Rows, Path, Types | None], None]


def check_target(path: Path, *sources: object) -> Write:
    """Return the function that writes rows to this path. Call it before expensive work.

    Raises DataError as `write_rows` does for a suffix or a folder, and if the path is one of the `sources`
    that the rows come from, since writing would destroy it.
    """
    write = {".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if write is None:
        raise DataError(f"{path} has the suffix '{path.suffix}'; rows are written to .jsonl or .parquet.")
    if not path.parent.is_dir():
        raise DataError(
            f"{path} cannot be written: the folder {path.parent} does not exist; create it first."
        )
    if path.is_dir():
        raise DataError(f"{path} cannot be written: it is a folder; name a file.")
    check_apart(path, *sources)
    return write


def check_apart(path: Path, *sources: object) -> None:
    """Raise DataError if writing to the path would destroy one of the files that a command reads.

    Args:
        path: the file to write.
        sources: names or paths of what is read; those that are no files, and None, are ignored.
    """
    if any(_is_same_file(path, source) for source in sources):
        raise DataError(
            f"{path} is not written: it is the data to read, which would be lost; give another --output."
        )


def _is_same_file(path: Path, source: object) -> bool:
    try:
        return isinstance(source, str | Path) and path.samefile(Path(source).expanduser())
    except (OSError, ValueError):  # one of them is not a file, such as a hub id
        return False


def column_type(values: Sequence[Any]) -> pa.DataType | None:
    """Return the Arrow type of values; None if they have no common type, or Parquet cannot hold it."""
    import pyarrow as pa

    try:
        kind = pa.array(values).type
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return None
    # Parquet has no form for an object without keys, and a column of nulls has no type to agree on.
    return None if pa.types.is_null(kind) or "struct<>" in str(kind) else kind


def _replace(path: Path, rows: Rows, write: Write, types: Types | None) -> None:
    """Write a temporary file, then rename it, so that readers never see a partial file."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part, rows, path, types)
        os.replace(part, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):  # on a read-only disk, an absent file cannot be removed either
            part.unlink(missing_ok=True)


def _jsonl(part: Path, rows: Rows, path: Path, types: Types | None) -> None:
    with part.open("wb") as file:
        for number, row in enumerate(rows, 1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"{path} is not written: row {number} cannot be written as JSON ({error})."
                ) from error
        file.flush()
        os.fsync(file.fileno())


def _parquet(part: Path, rows: Rows, path: Path, types: Types | None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def tables() -> Iterator[pa.Table]:
        while batch := list(islice(rows, None if types is None else BATCH)):
            yield _table(batch, path, types)

    with part.open("wb") as file:
        made = tables()
        first = next(made)
        try:
            with pq.ParquetWriter(file, first.schema) as writer:
                for table in chain([first], made):
                    writer.write_table(table)
        except pa.ArrowException as error:  # an object without keys, which Parquet has no form for
            raise DataError(f"{path} is not written as Parquet ({error}); write .jsonl.") from error
        file.flush()
        os.fsync(file.fileno())


def _table(rows: Sequence[Mapping[str, Any]], path: Path, types: Types | None) -> pa.Table:
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row) if types is None else types
    arrays = {}
    for name in names:
        try:
            arrays[name] = pa.array([row.get(name) for row in rows], types and types[name])
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise DataError(
                f"{path} is not written: column '{name}' is not of one type ({error}); write .jsonl."
            ) from error
    return pa.table(arrays)


def _plain(value: Any) -> Any:
    """Return mappings as dicts and tuples as lists, recursively, as both formats need them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
