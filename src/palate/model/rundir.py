"""A run's directory as the name of a model: what stands for it is its last checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path

from palate.errors import ModelError

_STEP = re.compile(r"step-(\d+)")


def checkpoints_in(run: Path) -> dict[int, Path]:
    """The finished checkpoints of a run by their step, in order; one that is being written has another name.

    Raises:
        OSError: they are there and cannot be read.
    """
    try:
        entries = list((run / "checkpoints").iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def model_in(directory: Path) -> Path:
    """The directory itself, or, of a run's, that of its last finished checkpoint.

    Raises:
        ModelError: the run has none yet, or they cannot be read.
    """
    if not _is_run(directory):
        return directory
    try:
        found = checkpoints_in(directory)
    except OSError as error:
        raise ModelError(f"{str(error.filename)!r} cannot be read: {error.strerror}") from None
    if not found:
        raise ModelError(
            f"the run {str(directory)!r} has no finished checkpoint to take as a model; wait until it has "
            "saved one, or give the command that began it again"
        )
    return found[max(found)]


def _is_run(directory: Path) -> bool:
    """A model has a `config.json`, too, but that names no method."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"method", "config", "versions"} <= found.keys()
