"""A run's summary and the latest value of each metric."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.rundir.files import METRICS, SUMMARY, read_object

TAIL = 1 << 16
"""Number of bytes at the end of `metrics.jsonl` that are read for the latest values."""


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return the content of `summary.json`; None before the run has finished.

    Raises:
        RunError: the file cannot be read, or does not contain a JSON object.
    """
    return read_object(directory / SUMMARY)


def latest_numbers(directory: Path) -> dict[str, Any]:
    """Return the last value of each metric near the end of `metrics.jsonl`; empty without such a file.

    An incomplete last line is skipped.

    Raises:
        RunError: the file cannot be read.
    """
    path = directory / METRICS
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    numbers: dict[str, Any] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            numbers |= row
    return numbers
