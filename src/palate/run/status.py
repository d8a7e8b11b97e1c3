"""What state a run is in, as its directory tells."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from palate.errors import RunError

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
    """The state of the run in a directory; `killed` if it says that it runs and no process holds it.

    Raises:
        RunError: no run is there, or its status cannot be read.
    """
    path = directory / "status.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        status = Status(**found)
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
    """Write it; a reader sees the old or the new one, never a part."""
    write_json(directory / "status.json", asdict(status))


def is_held(directory: Path) -> bool:
    """Whether a process works on the run in a directory."""
    if not (directory / LOCK).exists():
        return False
    try:
        with FileLock(directory / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:
        return True  # another user's run, which is not ours to lock: its own word is all there is


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all, and wait until it is on disk."""
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
