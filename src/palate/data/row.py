"""One row of a data source, with its place in the source for messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from palate.data.account import RowError


@dataclass(frozen=True)
class Row:
    """One row of data."""

    columns: Mapping[str, Any]
    where: str
    """For messages: `prefs.jsonl:12`, `prefs.parquet row 7`, `owner/name[train] row 3`; all count from 1."""
    columnar: bool = field(default=False, compare=False)
    """True if the file gives every record the keys of all others, with empty values if it has none."""
    fault: RowError | None = field(default=None, compare=False)
    """The error if the row cannot be read; it has no columns then."""


def near(name: str, names: Iterable[str]) -> str:
    """Return ` Did you mean X?` if one of the names is close to this one, else an empty text."""
    close = difflib.get_close_matches(name, sorted(set(names)), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def first_line(error: Exception) -> str:
    """Return the first line of another library's message."""
    return str(error).strip().partition("\n")[0]
