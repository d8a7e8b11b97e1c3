"""The one answer to "is this a run?": its `config.json` names a method, a configuration and versions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.rundir.checkpoints import is_checkpoint
from palate.rundir.files import CONFIG, STATUS, read_json

_KINDS: Mapping[str, type] = {"method": str, "config": dict, "versions": dict}
"""Entries that every run's `config.json` has. A model has a `config.json` as well, without them."""


def description_in(directory: Path) -> dict[str, Any] | None:
    """Return the `config.json` of a run, None if the directory holds no run.

    Raises:
        RunError: the file cannot be read, or is not JSON.
    """
    found = read_json(directory / CONFIG)
    if not isinstance(found, dict):
        return None
    return found if all(isinstance(found.get(name), kind) for name, kind in _KINDS.items()) else None


def read_description(directory: Path) -> dict[str, Any]:
    """Return the `config.json` of a run.

    Raises:
        RunError: the directory holds no run, or the file is broken; the text says where to look.
    """
    if is_checkpoint(directory):
        run = directory.parent.parent
        raise RunError(
            f"{str(directory)!r} is a checkpoint; give its run, {str(run)!r} (`palate chat` picks a "
            "checkpoint by --step)"
        )
    if not os.path.isdir(directory):  # in a folder that may not be entered, `Path.is_dir` raises
        what = "is a file" if os.path.exists(directory) else "is not there"
        raise RunError(f"{str(directory)!r} {what}; expected the directory of a run, as `palate runs` lists")
    found = description_in(directory)
    if found is None:
        raise RunError(f"{str(directory)!r} holds no run: no config.json there is a run's; see `palate runs`")
    return found


def holds_run(directory: Path) -> bool:
    """Return True for a directory with a run, a broken one included, which a list of runs should show."""
    try:
        return description_in(directory) is not None or (directory / STATUS).exists()
    except (OSError, RunError):
        return True
