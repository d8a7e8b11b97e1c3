"""Rows of tables: Parquet files, and CSV and TSV files with a line of names at the top."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate.data.account import RowError
from palate.data.row import Row, first_line
from palate.errors import DataError


def parquet_rows(path: Path, source: str) -> Iterator[Row]:
    """The rows of a Parquet file, read in blocks.

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
    """The rows of a CSV or TSV file. An empty cell counts as missing; numbers stay text until they are used.

    Raises:
        DataError: the file is damaged, or no table.
    """
    import pyarrow as pa
    from pyarrow import csv

    name = path.name.lower().removesuffix(".gz")
    torn: list[Any] = []

    def keep_place(row: Any) -> str:
        torn.append(row)
        return "skip"

    parse = csv.ParseOptions(
        delimiter="\t" if name.endswith(".tsv") else ",",
        newlines_in_values=True,
        invalid_row_handler=keep_place,
    )
    number = 0
    try:
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


def _check_text(path: Path) -> None:
    """Decode the whole file: pyarrow reports a row with other bytes on the screen, not to its caller."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        while block := file.read(1 << 20):
            decoder.decode(block)
        decoder.decode(b"", final=True)


def _names(path: Path, parse: Any) -> list[str]:
    from pyarrow import csv

    with csv.open_csv(path, parse_options=parse) as reader:
        return list(reader.schema.names)
