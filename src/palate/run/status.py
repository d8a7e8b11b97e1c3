"""The state of a run, as recorded in its directory."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from palate.errors import RunError

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
    path = directory / "status.json"
    try:
        status = Status(**json.loads(path.read_text(encoding="utf-8")))
        known = status.state in get_args(State)
        for name, kind in _KINDS.items():
            if not isinstance(getattr(status, name), kind):
                raise ValueError(f"{name} is {getattr(status, name)!r}")
    except FileNotFoundError:
        raise RunError(f"{str(directory)!r} holds no run: it has no status.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"{str(path)!r} cannot be read: {error}") from None
    if not known:
        raise RunError(f"{str(path)!r} has the state {status.state!r}; expected one of {get_args(State)}")
    if status.state == "running" and not is_held(directory):
        return Status(**{**asdict(status), "state": "killed"})
    return status


def write_status(directory: Path, status: Status) -> None:
    """Write a status; a reader sees the old or the new status, never a partial file."""
    write_json(directory / "status.json", asdict(status))


def is_held(directory: Path) -> bool:
    """Return whether a process works on the run in a directory."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return True  # another user's run cannot be locked, so its status is believed


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file completely or not at all, and wait until it is on disk."""
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the file names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
