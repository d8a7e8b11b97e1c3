"""Rows of tables: Parquet files, and CSV and TSV files with a header line."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from palate.data.account import RowError
from palate.data.row import Row, first_line
from palate.errors import DataError


def parquet_rows(path: Path, source: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file, read in blocks.

    Raises:
        DataError: the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(columns, f"{source} row {number}", columnar=True)
    except (pa.ArrowException, OSError, UnicodeDecodeError, ValueError, OverflowError) as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"{source} cannot be read as Parquet{place} ({first_line(error)}); write or copy it again."
        ) from error


def text_rows(path: Path, source: str) -> Iterator[Row]:
    """Yield the rows of a CSV or TSV file. Empty cells count as missing; numbers stay text until used.

    Raises:
        DataError: the file is damaged or is not a table.
    """
    import pyarrow as pa
    from pyarrow import csv

    name = path.name.lower().removesuffix(".gz")
    torn: list[Any] = []

    def keep_place(row: Any) -> str:
        torn.append(row)
        return "skip"

    parse = csv.ParseOptions(
        delimiter=_delimiter(path) if name.endswith(".csv") else "\t",
        newlines_in_values=True,
        invalid_row_handler=keep_place,
    )
    number = 0
    try:
        refuse_utf16(path, source)
        _check_text(path)
        names = _names(path, parse)
        convert = csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False
        )
        with csv.open_csv(path, parse_options=parse, convert_options=convert) as reader:
            for batch in reader:
                for columns in batch.to_pylist():
                    number += 1
                    filled = {key: value or None for key, value in columns.items() if key}
                    yield Row(filled, f"{source} row {number}")
    except DataError:
        raise
    except (pa.ArrowException, OSError, EOFError, zlib.error, ValueError) as error:
        place = f" after row {number}" if number else ""
        raise DataError(
            f"{source} cannot be read as a table{place} ({first_line(error)}); expected a line of names, "
            "then as many values in every row, quoted where they have commas or line breaks."
        ) from error
    for row in torn:
        where = f"{source} line {row.number}" if row.number else source
        what = f"{where}: the row has {row.actual_columns} values; expected {row.expected_columns}"
        yield Row(
            {}, where, fault=RowError(what, where, "the row has another number of values than the names")
        )


def refuse_utf16(path: Path, source: str) -> None:
    """Raise DataError for a file in UTF-16, which some Windows programs write by default."""
    with _opened(path) as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{source} is in UTF-16; save it as UTF-8.")


def _opened(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb"))


def _delimiter(path: Path) -> str:
    """Return the character between the names in the first line: a comma, or a semicolon or a tab without any.

    Spreadsheets write semicolons in countries where the comma is the decimal point.
    """
    try:
        with _opened(path) as file:
            names = file.readline(1 << 16)
    except (OSError, EOFError, zlib.error):
        return ","  # reading the file explains it
    return next((sign for sign in ",;\t" if sign.encode() in names), ",")


def _check_text(path: Path) -> None:
    """Decode the whole file: pyarrow prints an error about invalid bytes and does not raise it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _opened(path) as file:
        while block := file.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)


def _names(path: Path, parse: Any) -> list[str]:
    from pyarrow import csv

    with csv.open_csv(path, parse_options=parse) as reader:
        return list(reader.schema.names)
