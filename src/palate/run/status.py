"""Writing of a run's status, and of any JSON file, so that readers never see a partial file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from palate.rundir import Status
from palate.rundir.files import STATUS


def write_status(directory: Path, status: Status) -> None:
    """Write a status; a reader sees the old or the new status, never a partial file."""
    write_json(directory / STATUS, asdict(status))


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
