"""Files of a finished run for other programs to read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.data import write_rows
from palate.errors import RunError
from palate.journal import Journal
from palate.run.status import write_json
from palate.rundir import read_summary
from palate.rundir.files import COMPLETIONS, SAMPLES, SUMMARY
from palate.rundir.writing import writing


def write_exports(
    directory: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], journal: Journal
) -> None:
    """Write the summary, samples, and every completion of the policy with its reward.

    Args:
        directory: the run's directory.
        summary: numbers by name.
        samples: rows of held-out prompts; no file is written if there are none.
        journal: source of the completions; no file is written if there are none.

    Raises:
        RunError: a file cannot be written.
    """
    with writing(directory / SUMMARY):
        _write(directory, summary, samples, journal)


def _write(
    directory: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], journal: Journal
) -> None:
    if samples:
        write_rows(directory / SAMPLES, samples)
    rows = list(journal.table())
    if len({type(row["prompt"]) for row in rows}) > 1:  # a column has one type
        rows = [{**row, "prompt": _as_text(row["prompt"])} for row in rows]
    if rows:
        write_rows(directory / COMPLETIONS, rows)
    write_json(directory / SUMMARY, finite(summary))


def remove_exports(directory: Path) -> None:
    """Remove the exports of a finished run that continues with more steps."""
    with writing(directory / SUMMARY):
        for name in (SUMMARY, SAMPLES, COMPLETIONS):
            (directory / name).unlink(missing_ok=True)


def earlier_summary(directory: Path) -> dict[str, Any] | None:
    """Return the summary of a run that has finished before; None if it is missing or damaged."""
    try:
        return read_summary(directory)
    except RunError:
        return None


def finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers with None for infinity and NaN, which JSON cannot express."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _as_text(content: Any) -> str:
    """Return a prompt as text, so that a column of texts and conversations has one type."""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
