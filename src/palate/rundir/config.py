"""The test for runs: the `config.json` of a run names a method, a configuration and versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.rundir.checkpoints import is_checkpoint
from palate.rundir.files import CONFIG, STATUS, read_json

_KINDS: Mapping[str, type] = {"method": str, "config": dict, "versions": dict}
"""Entries of every run's `config.json`; the `config.json` of a model does not have them."""


def description_in(directory: Path) -> dict[str, Any] | None:
    """Return the `config.json` of a run, None if the directory holds no run.

    Raises:
        RunError: the file cannot be read, or is not JSON.
    """
    content = read_json(directory / CONFIG)
    if not isinstance(content, dict):
        return None
    return content if all(isinstance(content.get(name), kind) for name, kind in _KINDS.items()) else None


def read_description(directory: Path) -> dict[str, Any]:
    """Return the `config.json` of a run.

    Raises:
        RunError: the directory holds no run, or the file is damaged.
    """
    if is_checkpoint(directory):
        run = directory.parent.parent
        raise RunError(
            f"{str(directory)!r} is a checkpoint; give its run, {str(run)!r} (`palate chat` picks a "
            "checkpoint by --step)"
        )
    if not os.path.isdir(directory):  # `Path.is_dir` raises in a folder without permission
        what = "is a file" if os.path.exists(directory) else "is not there"
        raise RunError(f"{str(directory)!r} {what}; expected the directory of a run, as `palate runs` lists")
    description = description_in(directory)
    if description is None:
        raise RunError(f"{str(directory)!r} holds no run: it has no config.json of a run; see `palate runs`")
    return description


def holds_run(directory: Path) -> bool:
    """Return whether a directory holds a run, including a damaged run, which a list of runs should show."""
    try:
        return description_in(directory) is not None or (directory / STATUS).exists()
    except (OSError, RunError):
        return True
