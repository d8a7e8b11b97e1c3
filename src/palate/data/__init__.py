"""Data: rows from files and from the hub, records from rows, an order to train in, and rows to files."""

from palate.data.account import Account, RowError
from palate.data.formats import read_comparisons, read_demonstrations, read_prompts
from palate.data.row import Row
from palate.data.rows import read_rows
from palate.data.stream import Stream
from palate.data.write import check_target, write_rows

__all__ = [
    "Account",
    "Row",
    "RowError",
    "Stream",
    "check_target",
    "read_comparisons",
    "read_demonstrations",
    "read_prompts",
    "read_rows",
    "write_rows",
]
