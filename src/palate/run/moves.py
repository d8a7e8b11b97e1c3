"""Directories of checkpoints that appear and disappear whole, whatever moment a process is killed at."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from palate.run.status import sync

NOTE = "checkpoint.json"
"""File of a checkpoint with its position in the run, and the size and hash of every other file."""

_OLD = ".old"


def tidy(directory: Path) -> None:
    """Clean up after a process that was killed while it wrote or removed a checkpoint."""
    for left in directory.glob(".step-*"):
        replaced = left.with_name(left.name.removeprefix(".").removesuffix(_OLD))
        if left.name.endswith(_OLD) and (left / NOTE).exists() and not replaced.exists():
            os.replace(left, replaced)  # the new checkpoint was not in place yet
        else:
            shutil.rmtree(left, ignore_errors=True)


def put_aside(path: Path) -> Path:
    """Rename a checkpoint before its removal, so that a kill leaves no partial checkpoint under its name."""
    aside = path.with_name(f".{path.name}{_OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def remove(aside: Path) -> None:
    """Delete a checkpoint that `put_aside` has renamed."""
    (aside / NOTE).unlink(missing_ok=True)  # first, so that `tidy` does not restore a partial checkpoint
    shutil.rmtree(aside, ignore_errors=True)


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_tree(directory: Path) -> None:
    """Wait until all files of a directory are on disk, so that its rename cannot reach the disk first."""
    paths: Iterable[Path] = (directory, *directory.rglob("*"))
    for path in paths:
        sync(path)
