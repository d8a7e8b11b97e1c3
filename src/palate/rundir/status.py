"""The state of a run, read from its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from palate.errors import RunError
from palate.rundir.files import STATUS, read_object

State = Literal["running", "finished", "interrupted", "failed", "killed"]
"""`interrupted`: by Ctrl-C; `failed`: with an error; `killed`: the process ended without a final status."""

LOCK = ".lock"
"""File that the process of a run keeps locked until it ends."""


@dataclass(frozen=True)
class Status:
    """The state and progress of a run: `step` of `steps` are finished; `steps` is 0 if not known yet."""

    state: State
    step: int = 0
    steps: int = 0
    reason: str = ""
    """The error message of a failed run."""
    seconds: float = 0.0
    """Wall-clock time in seconds, summed over all starts of the run."""
    updated: str = ""
    """Time of the last write: local time, ISO 8601."""


_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "steps": int,
    "reason": str,
    "seconds": (int, float),
    "updated": str,
}


def read_status(directory: Path) -> Status:
    """Return the status of the run in a directory; `killed` if it says `running` but no process works on it.

    Raises:
        RunError: the directory holds no run, or its status cannot be read.
    """
    path = directory / STATUS
    content = read_object(path)
    if content is None:
        raise RunError(f"{str(directory)!r} holds no run: it has no status.json")
    try:
        status = Status(**content)
        known = status.state in get_args(State)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(status, name), kind):
                raise ValueError(f"{name} is {getattr(status, name)!r}")
    except (ValueError, TypeError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}") from None
    if not known:
        raise RunError(f"{str(path)!r} has the state {status.state!r}; expected one of {get_args(State)}")
    if status.state == "running" and not is_held(directory):
        return Status(**{**asdict(status), "state": "killed"})
    return status


def is_held(directory: Path) -> bool:
    """Return whether a process works on the run in a directory."""
    from filelock import FileLock, Timeout  # slow to import, and only needed if the status is running

    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return True  # another user's run cannot be locked, so its status is believed
