"""Names and readers of the files in a run's directory. A file that cannot be read raises `RunError`."""

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
POOL, VERDICTS = "pool.json", "verdicts.db"
PUBLISHED = "published"
"""Directory of weights that are published to a server."""

UNREADABLE = (OSError, ValueError, RecursionError)
"""Errors raised when a JSON file cannot be read. `RunError` is a `ValueError`, so it is included."""

BIGGEST = 1e30
"""Larger numbers count as infinite. No real measurement is this large."""


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
    """Return the value in a JSON file; None if the file does not exist.

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
    """Return the object in a JSON file; None if the file does not exist.

    Raises:
        RunError: the file cannot be read, is not JSON, or does not contain an object.
    """
    value = read_json(path)
    if value is None and not path.exists():
        return None
    if not isinstance(value, dict):
        raise RunError(f"{str(path)!r} cannot be read: it does not contain a JSON object")
    return value


def read_lines(path: Path, parse: Callable[[dict[str, Any]], T | None]) -> tuple[list[T], int]:
    """Return the rows of a JSON-lines file that `parse` accepts, and the number of other lines.

    An unfinished last line is ignored and not counted: the run may still be writing it. A file that does not
    exist has no rows.

    Raises:
        RunError: the file cannot be read.
    """
    lines = (read_bytes(path) or b"").split(b"\n")
    unfinished = lines.pop()  # empty after a complete last line; else it may end within a character
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
    """Return a number as a float; NaN for any other value and for numbers above `BIGGEST`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= BIGGEST:
        return math.nan
    return float(value)


def finite_number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number by name; None if it is missing or not finite."""
    value = as_number(values.get(name))
    return value if math.isfinite(value) else None
