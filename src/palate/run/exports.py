"""Files of a finished run for other programs to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palate.data import column_type, write_rows
from palate.data.write import BATCH
from palate.errors import RunError
from palate.journal import Journal
from palate.run.status import write_json
from palate.rundir import read_summary
from palate.rundir.files import COMPLETIONS, SAMPLES, SUMMARY
from palate.rundir.writing import writing

if TYPE_CHECKING:
    import pyarrow as pa


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
    if journal.has_completions():
        _write_completions(directory / COMPLETIONS, journal)
    write_json(directory / SUMMARY, finite(summary))


def _write_completions(path: Path, journal: Journal) -> None:
    """Write every completion; only a part of them is in memory at once."""
    import pyarrow as pa

    prompt = _prompt_type(journal)
    types = {
        "prompt": prompt or pa.string(),
        "completion": pa.string(),
        "reward": pa.float64(),
        "finish": pa.string(),
        "tokens": pa.int64(),
        "policy_version": pa.int64(),
        "place": pa.string(),
    }
    rows: Iterator[Mapping[str, Any]] = journal.table()
    if prompt is None:
        rows = ({**row, "prompt": _as_text(row["prompt"])} for row in rows)
    write_rows(path, rows, types)


def _prompt_type(journal: Journal) -> pa.DataType | None:
    """Return the type of all prompts; None for texts beside conversations, which have no common type."""
    import pyarrow as pa

    prompts, seen = journal.prompts(), pa.schema([])
    while batch := list(islice(prompts, BATCH)):
        kind = column_type(batch)
        if kind is None:
            return None
        try:
            seen = pa.unify_schemas([seen, pa.schema({"prompt": kind})], promote_options="permissive")
        except pa.ArrowException:
            return None
    return seen.field("prompt").type


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
