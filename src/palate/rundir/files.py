"""Names of the files in a run's directory, and how they are read: an error is a `RunError` that names one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from palate.errors import RunError

T = TypeVar("T")

CONFIG, STATUS, METRICS, JOURNAL = "config.json", "status.json", "metrics.jsonl", "journal.db"
SUMMARY, SAMPLES, COMPLETIONS = "summary.json", "samples.jsonl", "completions.parquet"
CHECKPOINTS = "checkpoints"

UNREADABLE = (OSError, ValueError, RecursionError)
"""Errors of reading a JSON file; `RunError` is among them, as a `ValueError`."""

BIGGEST = 1e30
"""Larger numbers count as infinite: no measurement of ours comes near."""


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file, None if there is no such file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else None
        raise RunError(f"{str(path)!r} cannot be read: {reason or error}") from error


def read_json(path: Path) -> Any:
    """Return the value of a JSON file, None if there is no such file.

    Raises:
        RunError: it cannot be read, or is not JSON.
    """
    text = read_bytes(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} cannot be read: it is not JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file, None if there is no such file.

    Raises:
        RunError: it cannot be read, is not JSON, or holds something else.
    """
    value = read_json(path)
    if value is None and not path.exists():
        return None
    if not isinstance(value, dict):
        raise RunError(f"{str(path)!r} cannot be read: it holds no JSON object")
    return value


def read_lines(path: Path, parse: Callable[[dict[str, Any]], T | None]) -> tuple[list[T], int]:
    """Return the rows of a JSON-lines file that `parse` accepts, and a count of the other lines.

    An unfinished last line is left out without being counted: the run may be writing it.

    Raises:
        RunError: the file cannot be read. A file that does not exist has no rows.
    """
    lines = (read_bytes(path) or b"").split(b"\n")
    unfinished = lines.pop()  # empty after a complete last line; else it may end within a letter
    rows = [_parsed(line, parse) for line in lines if line.strip()]
    usable = [row for row in rows if row is not None]
    last = _parsed(unfinished, parse)
    return usable + ([] if last is None else [last]), len(rows) - len(usable)


def _parsed(line: bytes, parse: Callable[[dict[str, Any]], T | None]) -> T | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parse(value) if isinstance(value, dict) else None


def as_number(value: object) -> float:
    """Return a float; NaN for a value that is not a number, or too large to be meant."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= BIGGEST:
        return math.nan
    return float(value)


def finite_number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number by its name; None if it is missing or not a finite number."""
    value = as_number(values.get(name))
    return value if math.isfinite(value) else None
