"""Names of the files in a run's directory, and readers for them; an error is a `RunError` with the file."""

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
"""Errors of reading a JSON file, including `RunError`, which is a `ValueError`."""

BIGGEST = 1e30
"""Largest number that counts as finite, far above any measurement."""


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file; None if it does not exist.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        reason = error.strerror if isinstance(error, OSError) else None
        raise RunError(f"{str(path)!r} cannot be read: {reason or error}") from error


def read_json(path: Path) -> Any:
    """Return the value of a JSON file; None if it does not exist.

    Raises:
        RunError: the file cannot be read, or is not JSON.
    """
    text = read_bytes(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} cannot be read: it is not JSON ({error})") from error


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the object of a JSON file; None if it does not exist.

    Raises:
        RunError: the file cannot be read, is not JSON, or holds another value.
    """
    value = read_json(path)
    if value is None and not path.exists():
        return None
    if not isinstance(value, dict):
        raise RunError(f"{str(path)!r} cannot be read: it holds no JSON object")
    return value


def read_lines(path: Path, parse: Callable[[dict[str, Any]], T | None]) -> tuple[list[T], int]:
    """Return the rows of a JSON-lines file that `parse` accepts, and the number of other lines.

    An incomplete last line is ignored and not counted, since the run may be writing it.

    Raises:
        RunError: the file cannot be read. A missing file has no rows.
    """
    lines = (read_bytes(path) or b"").split(b"\n")
    unfinished = lines.pop()  # empty after a complete last line; else possibly not valid UTF-8
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
    """Return a value as float; NaN if it is not a number or implausibly large."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= BIGGEST:
        return math.nan
    return float(value)


def finite_number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number by its name; None if it is missing or not finite."""
    value = as_number(values.get(name))
    return value if math.isfinite(value) else None
