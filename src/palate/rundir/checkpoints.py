"""The finished checkpoints of a run."""

from __future__ import annotations

import re
from pathlib import Path

from palate.errors import RunError
from palate.rundir.files import CHECKPOINTS

_STEP = re.compile(r"step-(\d+)")


def is_checkpoint(directory: Path) -> bool:
    """Return True for `RUN/checkpoints/step-N`, by its name alone."""
    return directory.parent.name == CHECKPOINTS and _STEP.fullmatch(directory.name) is not None


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Return the finished checkpoints of a run by their step, in order; an unfinished one has another name.

    Raises:
        RunError: they cannot be read.
    """
    try:
        entries = list((run / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise RunError(f"{str(run / CHECKPOINTS)!r} cannot be read: {error.strerror}") from error
    found = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(found.items()))


def checkpoint(run: Path, step: int | None = None) -> Path:
    """Return the directory of a run's last finished checkpoint, or of the checkpoint of a step.

    Raises:
        RunError: there is no checkpoint, none of that step, or they cannot be read.
    """
    found = checkpoints_in(run)
    if not found:
        raise RunError(
            f"the run {str(run)!r} has no finished checkpoint yet; wait until it has saved one, or give the "
            "command that began it again"
        )
    if step is not None and step not in found:
        there = ", ".join(map(str, found))
        raise RunError(f"the run {str(run)!r} has no checkpoint of step {step}; it has {there}")
    return found[max(found) if step is None else step]
