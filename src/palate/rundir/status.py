"""The state of a run, read from its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from palate.errors import RunError
from palate.rundir.files import STATUS, read_object

State = Literal["running", "finished", "interrupted", "failed", "killed"]
"""`interrupted`: by Ctrl-C; `failed`: by an error; `killed`: the process ended without writing a state."""

LOCK = ".lock"
"""A file that the process of a run keeps locked while it lives."""


@dataclass(frozen=True)
class Status:
    """The state and progress of a run: `step` of `steps` are done; `steps` is 0 if not known yet."""

    state: State
    step: int = 0
    steps: int = 0
    reason: str = ""
    """The error, for a run that failed."""
    seconds: float = 0.0
    """Wall-clock time, summed over all starts and resumes."""
    updated: str = ""
    """The time of this status: local time, ISO 8601."""


_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "steps": int,
    "reason": str,
    "seconds": (int, float),
    "updated": str,
}


def read_status(directory: Path) -> Status:
    """Return the status of a run; the state is `killed` if it was `running` but no process holds the lock.

    Raises:
        RunError: the directory is not a run, or its status cannot be read.
    """
    path = directory / STATUS
    fields = read_object(path)
    if fields is None:
        raise RunError(f"{str(directory)!r} is not a run: it has no status.json")
    try:
        status = Status(**fields)
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
    """Return True while a process is working on the run in a directory."""
    from filelock import FileLock, Timeout  # imported late: only needed for a run marked as running

    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return True  # another user's run cannot be locked, so its recorded state is trusted
