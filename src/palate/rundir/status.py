"""The state of a run, read from its directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from palate.errors import RunError
from palate.rundir.files import STATUS, read_object

State = Literal["running", "finished", "interrupted", "failed", "killed"]
"""`interrupted`: by Ctrl-C; `failed`: by an error; `killed`: gone without a word."""

LOCK = ".lock"
"""File whose lock the process of a run holds for as long as it lives."""


@dataclass(frozen=True)
class Status:
    """How far a run has come. `step` of `steps` are done; `steps` is 0 where not known yet."""

    state: State
    step: int = 0
    steps: int = 0
    reason: str = ""
    """What went wrong, for a run that failed."""
    seconds: float = 0.0
    """Wall-clock time, over all of its starts."""
    updated: str = ""
    """When this was written: local time, ISO 8601."""


_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "steps": int,
    "reason": str,
    "seconds": (int, float),
    "updated": str,
}


def read_status(directory: Path) -> Status:
    """Return the state of the run in a directory: `killed` if it says that it runs and no process holds it.

    Raises:
        RunError: no run is there, or its status cannot be read.
    """
    path = directory / STATUS
    found = read_object(path)
    if found is None:
        raise RunError(f"{str(directory)!r} holds no run: it has no status.json")
    try:
        status = Status(**found)
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
    """Return True while a process works on the run in a directory."""
    from filelock import FileLock, Timeout  # only a run that says that it is running needs it

    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return True  # another user's run, which is not ours to lock: its own word is all there is
