"""The finished checkpoints of a run."""

from __future__ import annotations

import re
from pathlib import Path

from palate.errors import RunError
from palate.rundir.files import CHECKPOINTS

_STEP = re.compile(r"step-(\d+)")


def is_checkpoint(directory: Path) -> bool:
    """Return whether a path has the form `RUN/checkpoints/step-N`."""
    return directory.parent.name == CHECKPOINTS and _STEP.fullmatch(directory.name) is not None


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Return the finished checkpoints of a run by step, in order; unfinished ones have other names.

    Raises:
        RunError: the checkpoints cannot be read.
    """
    try:
        entries = list((run / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise RunError(f"{str(run / CHECKPOINTS)!r} cannot be read: {error.strerror}") from error
    by_step = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(by_step.items()))


def checkpoint(run: Path, step: int | None = None) -> Path:
    """Return the directory of a run's last finished checkpoint, or of the checkpoint of a step.

    Raises:
        RunError: the checkpoint does not exist, or the checkpoints cannot be read.
    """
    by_step = checkpoints_in(run)
    if not by_step:
        raise RunError(
            f"the run {str(run)!r} has no finished checkpoint yet; wait until it has saved one, or run its "
            "command again"
        )
    if step is not None and step not in by_step:
        steps = ", ".join(map(str, by_step))
        raise RunError(f"the run {str(run)!r} has no checkpoint of step {step}; it has {steps}")
    return by_step[max(by_step) if step is None else step]
