"""One row of a data source, with the place it came from, so that every later message can name it."""

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
    """It comes from a file that gives every record the keys of all others, empty where it has none."""
    fault: RowError | None = field(default=None, compare=False)
    """Why it cannot be read; it has no columns then."""


def near(name: str, names: Iterable[str]) -> str:
    """` Did you mean X?` where one of the names is close to this one, else nothing."""
    found = difflib.get_close_matches(name, sorted(set(names)), n=1)
    return f" Did you mean {found[0]}?" if found else ""


def first_line(error: Exception) -> str:
    """The first line of another library's message."""
    return str(error).strip().partition("\n")[0]
