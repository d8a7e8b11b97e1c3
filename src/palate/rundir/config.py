"""Recognise a run directory: its `config.json` has a method, a configuration and versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.rundir.checkpoints import is_checkpoint
from palate.rundir.files import CONFIG, STATUS, read_json

_KINDS: Mapping[str, type] = {"method": str, "config": dict, "versions": dict}
"""Entries of every run's `config.json`. A model's `config.json` lacks them."""


def description_in(directory: Path) -> dict[str, Any] | None:
    """Return the content of a run's `config.json`; None if the directory is not a run.

    Raises:
        RunError: the file cannot be read, or is not JSON.
    """
    content = read_json(directory / CONFIG)
    if not isinstance(content, dict):
        return None
    return content if all(isinstance(content.get(name), kind) for name, kind in _KINDS.items()) else None


def read_description(directory: Path) -> dict[str, Any]:
    """Return the content of a run's `config.json`.

    Raises:
        RunError: the directory is not a run, or the file is broken; the message names a likely place.
    """
    if is_checkpoint(directory):
        run = directory.parent.parent
        raise RunError(
            f"{str(directory)!r} is a checkpoint; give the run's directory, {str(run)!r} (`palate chat` "
            "selects a checkpoint with --step)"
        )
    if not os.path.isdir(directory):  # `Path.is_dir` raises if the parent folder may not be entered
        problem = "is a file" if os.path.exists(directory) else "does not exist"
        raise RunError(f"{str(directory)!r} {problem}; expected the directory of a run (see `palate runs`)")
    description = description_in(directory)
    if description is None:
        raise RunError(f"{str(directory)!r} is not a run: it has no config.json of a run; see `palate runs`")
    return description


def holds_run(directory: Path) -> bool:
    """Return True for a run's directory, also if the run is broken: lists of runs should show it."""
    try:
        return description_in(directory) is not None or (directory / STATUS).exists()
    except (OSError, RunError):
        return True
