"""The finished checkpoints of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from palate.errors import RunError
from palate.rundir.files import CHECKPOINTS, SUMMARY, read_object

_STEP = re.compile(r"step-(\d+)")


def is_checkpoint(directory: Path) -> bool:
    """Return True for a path like `RUN/checkpoints/step-N`; the files are not read."""
    return directory.parent.name == CHECKPOINTS and _STEP.fullmatch(directory.name) is not None


def checkpoints_in(run: Path) -> dict[int, Path]:
    """Return the finished checkpoints of a run by step, in order. Unfinished ones have other names.

    Raises:
        RunError: the directory of checkpoints cannot be read.
    """
    try:
        entries = list((run / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise RunError(f"{str(run / CHECKPOINTS)!r} cannot be read: {error.strerror}") from error
    paths = {int(match[1]): path for path in entries if (match := _STEP.fullmatch(path.name))}
    return dict(sorted(paths.items()))


def checkpoint(run: Path, step: int | None = None) -> Path:
    """Return the directory of a run's result, or of the checkpoint at `step`.

    The result is the checkpoint that a finished run names in `summary.json`, else the last finished one.

    Raises:
        RunError: the run has no checkpoint, none at `step`, or the checkpoints cannot be read.
    """
    paths = checkpoints_in(run)
    if not paths:
        raise RunError(
            f"the run {str(run)!r} has no finished checkpoint yet; wait until it saves one, or repeat its "
            "command to resume it"
        )
    if step is not None and step not in paths:
        steps = ", ".join(map(str, paths))
        raise RunError(f"the run {str(run)!r} has no checkpoint of step {step}; it has steps {steps}")
    return paths[step] if step is not None else _result(run, paths)


def _result(run: Path, paths: Mapping[int, Path]) -> Path:
    """Return the checkpoint that the run names as its result if it exists, else the last one."""
    try:
        named = (read_object(run / SUMMARY) or {}).get("checkpoint")
    except RunError:
        named = None  # a damaged summary does not hide the checkpoints
    return next((path for path in paths.values() if str(path.relative_to(run)) == named), paths[max(paths)])
