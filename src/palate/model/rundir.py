"""A run's directory as the name of a model, which means its last checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from palate.errors import ModelError

_STEP = re.compile(r"step-(\d+)")


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Return the finished checkpoints of a run by step, in order; unfinished ones have other names.

    Raises:
        OSError: the checkpoints cannot be read.
    """
    try:
        entries = list((run / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    by_step = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(by_step.items()))


def model_in(directory: Path) -> Path:
    """Return the directory of a run's last finished checkpoint; return any other directory unchanged.

    Raises:
        ModelError: the run has no finished checkpoint, or its checkpoints cannot be read.
    """
    if not _is_run(directory):
        return directory
    try:
        checkpoints = checkpoints_in(directory)
    except OSError as error:
        raise ModelError(f"{str(error.filename)!r} cannot be read: {error.strerror}") from None
    if not checkpoints:
        raise ModelError(
            f"the run {str(directory)!r} has no finished checkpoint to use as a model; wait until it has "
            "saved one, or run its command again"
        )
    return checkpoints[max(checkpoints)]


def _is_run(directory: Path) -> bool:
    """Return whether a directory holds a run; the `config.json` of a model names no method."""
    try:
        content = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"method", "config", "versions"} <= content.keys()
