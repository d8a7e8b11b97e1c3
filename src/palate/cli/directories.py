"""What lies in the directory of a run, as far as the command line reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import RunError

UNREADABLE = (OSError, ValueError, RecursionError)
"""What reading a file of JSON raises, `RunError` and the like among them."""

TAIL = 1 << 16
"""Bytes at the end of `metrics.jsonl` that are read for the latest numbers."""

_STEP = re.compile(r"step-(\d+)")


def description(directory: Path) -> dict[str, Any]:
    """What `config.json` says of a run.

    Raises:
        RunError: no run is there, or that file is broken.
    """
    if directory.parent.name == "checkpoints" and _STEP.fullmatch(directory.name):
        run = directory.parent.parent
        raise RunError(
            f"{str(directory)!r} is a checkpoint; give its run, {str(run)!r}, and pick with --step"
        )
    if not os.path.isdir(directory):  # where a folder may not be entered, `Path.is_dir` raises
        what = "is a file" if os.path.exists(directory) else "is not there"
        raise RunError(f"{str(directory)!r} {what}; expected the directory of a run, as `palate runs` lists")
    found = _config(directory)
    if found is None or not _is_ours(found):
        raise RunError(f"{str(directory)!r} holds no run: no config.json there is a run's; see `palate runs`")
    return dict(found)


def holds_run(directory: Path) -> bool:
    """Whether a run, be it a broken one, is in a directory."""
    try:
        found = _config(directory)
        return _is_ours(found) or (directory / "status.json").exists()
    except UNREADABLE:
        return True  # to be looked at


def checkpoint(directory: Path, step: int | None = None) -> Path:
    """The directory of a run's last checkpoint, or of that of a step.

    Raises:
        RunError: there is none, or none of that step.
    """
    from palate.model.rundir import checkpoints_in  # brings torch, which listing runs need not wait for

    try:
        found = checkpoints_in(directory)
    except OSError as error:
        raise RunError(f"{str(error.filename)!r} cannot be read: {error.strerror}") from None
    if not found:
        raise RunError(
            f"the run {str(directory)!r} has no checkpoint yet; wait until it has saved one, or give the "
            "command that began it again"
        )
    if step is not None and step not in found:
        there = ", ".join(map(str, sorted(found)))
        raise RunError(f"the run {str(directory)!r} has no checkpoint of step {step}; it has {there}")
    return found[max(found) if step is None else step]


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        RunError: it cannot be read or is no JSON; `FileNotFoundError` goes through.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{str(path)!r} cannot be read: {reason}") from None


def latest_numbers(directory: Path) -> dict[str, Any]:
    """The last value of every metric in the end of `metrics.jsonl`; nothing if there is none.

    A last line that is being written, or was cut off, is passed over.
    """
    try:
        with (directory / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().splitlines()
    except FileNotFoundError:
        return {}
    numbers: dict[str, Any] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            numbers |= row
    return numbers


def _config(directory: Path) -> Any:
    """What is in `config.json`; None if there is no such file."""
    try:
        return read_json(directory / "config.json")
    except FileNotFoundError:
        return None


def _is_ours(found: Any) -> bool:
    """A model has a `config.json`, too."""
    if not isinstance(found, Mapping) or not {"method", "config", "versions"} <= found.keys():
        return False
    return isinstance(found["method"], str) and isinstance(found["config"], Mapping)
