"""What a run leaves for other programs to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.data import write_rows
from palate.journal import Journal


def write_completions(path: Path, journal: Journal) -> None:
    """Write every completion of a run with its prompt and reward; no file if there is none."""
    rows = list(journal.table())
    if len({type(row["prompt"]) for row in rows}) > 1:  # a column has one type
        rows = [{**row, "prompt": _as_text(row["prompt"])} for row in rows]
    if rows:
        write_rows(path, rows)


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """With null for infinity and not-a-number, for which JSON has no words."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _as_text(content: Any) -> str:
    """One type for a column of prompts, whichever way they were given."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
