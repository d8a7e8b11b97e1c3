"""Checkpoints of a run: written whole or not at all, checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from palate.errors import AGAIN, RunError
from palate.journal import key_of
from palate.learn import Learner
from palate.learn.state import restore_state, save_state, state_bytes
from palate.run.status import sync, write_json

NOTE = "checkpoint.json"
"""File of a checkpoint that tells where in the run it is, and what its other files have to be."""

_OLD = ".old"

SPARE = 32 << 20
"""Bytes that stay free beside a checkpoint, for journal and metrics."""


@dataclass(frozen=True)
class Position:
    """Where in its method a run is.

    A method is a row of stages, each a loop of steps; a stage that is done has a checkpoint of its end, so
    that a method that is run again from its beginning goes through it at once.
    """

    stage: int
    """Counted from 0 in the order in which the method begins them."""
    step: int
    """Steps of the stage that are done."""
    steps_before: int
    """Steps of all earlier stages."""
    metrics: int
    """Rows of metrics that were written."""
    ended: bool
    """Whether the stage was done."""

    @property
    def steps(self) -> int:
        """Steps done in all."""
        return self.steps_before + self.step


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk."""

    path: Path
    position: Position
    learner: dict[str, int]
    """The learner's numbers, for `restore_state`."""
    run: str
    files: dict[str, tuple[int, str]]
    """Size and SHA-256 of every other file."""

    def check(self, run: str) -> None:
        """Raise RunError unless it is whole and of this run."""
        if self.run != run:
            raise RunError(
                f"checkpoint {str(self.path)!r} belongs to another run; take it away to go on without it"
            )
        for name, (size, digest) in self.files.items():
            path = self.path / name
            found = path.stat().st_size if path.is_file() else None
            if found != size or _digest(path) != digest:
                what = "is missing" if found is None else "is not what was written"
                raise RunError(
                    f"checkpoint {str(self.path)!r} is damaged: {name} {what}; bring back a good copy, or "
                    "delete that directory to go on from the checkpoint before it"
                )


class Checkpoints:
    """The checkpoints in a run's directory.

    Args:
        directory: `checkpoints/` of the run.
        run: the run's id.
        keep: how many to keep, besides the ends of stages.

    Raises:
        RunError: one of them cannot be read, is damaged or belongs to another run.
    """

    def __init__(self, directory: Path, run: str, *, keep: int) -> None:
        self.directory = directory
        self._run = run
        self._keep = keep
        _tidy(directory)
        self._found = sorted((_read(p) for p in directory.glob("step-*")), key=lambda c: c.position.steps)
        self.cost = 0.0
        """Seconds that the last one took to write."""
        if self._found:
            self._found[-1].check(run)

    @property
    def latest(self) -> Checkpoint | None:
        """The one of most steps."""
        return self._found[-1] if self._found else None

    def of_version(self, version: int) -> Path | None:
        """The latest one of a learner after so many updates, if there is one."""
        return next((c.path for c in reversed(self._found) if c.learner["version"] == version), None)

    def restore(self, learner: Learner, stage: int) -> Position | None:
        """Put a learner where it was at the last checkpoint of a stage; None if the stage has none."""
        own = [c for c in self._found if c.position.stage == stage]
        if not own:
            if self._found and self._found[-1].position.stage > stage:
                raise RunError(
                    f"{str(self.directory)!r} lacks the checkpoint that ends stage {stage + 1}; bring it "
                    "back, or start anew with --overwrite"
                )
            return None
        found = own[-1]
        found.check(self._run)
        restore_state(learner, found.path, found.learner)
        return found.position

    def save(self, learner: Learner, position: Position) -> Path:
        """Write a learner in Hugging Face layout, with its state to go on from; then let go of older ones.

        Raises:
            RunError: there is no room for it, or it cannot be written. What was there before still is.
        """
        target = self.directory / f"step-{position.steps}"
        if self.latest is not None and self.latest.path == target and self.latest.position == position:
            return target
        began = time.perf_counter()
        scratch = self.directory / f".{target.name}.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            self._require_room(learner, target)
            scratch.mkdir()
            learner.save(scratch)
            numbers = save_state(learner, scratch)
            files = {
                p.relative_to(scratch).as_posix(): (p.stat().st_size, _digest(p))
                for p in sorted(scratch.rglob("*"))
                if p.is_file()
            }
            made = Checkpoint(target, position, numbers, self._run, files)
            write_json(scratch / NOTE, _note(made))
            _sync(scratch)
            aside = _put_aside(target) if target.exists() else None
            os.replace(scratch, target)
            sync(self.directory)
            if aside is not None:
                _remove(aside)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RunError(
                f"checkpoint {str(target)!r} cannot be written: {reason}; {self._safe()}"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # gone already if all went well
        self._found = [c for c in self._found if c.path != target] + [made]
        self._prune()
        self.cost = time.perf_counter() - began
        return target

    # -- inside ------------------------------------------------------------------------------------

    def _require_room(self, learner: Learner, target: Path) -> None:
        latest = sum(size for size, _ in self.latest.files.values()) if self.latest else 0
        need = max(latest, state_bytes(learner)) + SPARE
        free = shutil.disk_usage(self.directory).free
        if free < need:
            raise RunError(
                f"the disk is full: checkpoint {str(target)!r} needs {need / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free; {self._safe()}"
            )

    def _safe(self) -> str:
        safe = (
            f"everything up to step {self.latest.position.steps} is"
            if self.latest
            else "what is in journal.db is"
        )
        return f"{safe} safe: free some space and {AGAIN}"

    def _prune(self) -> None:
        """Remove old ones; the end of a stage stays, for a later stage may have to start from it."""
        passing = [c for c in self._found if not c.position.ended]
        for old in passing[: -self._keep]:
            _remove(_put_aside(old.path))
            self._found.remove(old)


def _note(checkpoint: Checkpoint) -> dict[str, Any]:
    note = {
        "run": checkpoint.run,
        "position": asdict(checkpoint.position),
        "learner": checkpoint.learner,
        "files": {name: list(facts) for name, facts in checkpoint.files.items()},
    }
    return note | {"key": key_of(note)}


def _read(path: Path) -> Checkpoint:
    try:
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        if note.pop("key") != key_of(note):
            raise ValueError("it is not what was written")
        return Checkpoint(
            path,
            Position(**note["position"]),
            note["learner"],
            note["run"],
            {name: (int(size), str(digest)) for name, (size, digest) in note["files"].items()},
        )
    except FileNotFoundError:
        raise RunError(
            f"checkpoint {str(path)!r} is partial or not ours: it has no {NOTE}; take it away to go on "
            "without it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"checkpoint {str(path)!r} is damaged: {NOTE} cannot be read ({error}); delete that directory to "
            "go on from the checkpoint before it"
        ) from None


def _tidy(directory: Path) -> None:
    """Clear away what a process left that was killed while it wrote or removed a checkpoint."""
    for left in directory.glob(".step-*"):
        replaced = left.with_name(left.name.removeprefix(".").removesuffix(_OLD))
        if left.name.endswith(_OLD) and (left / NOTE).exists() and not replaced.exists():
            os.replace(left, replaced)  # its successor had not taken the place
        else:
            shutil.rmtree(left, ignore_errors=True)


def _put_aside(path: Path) -> Path:
    """Take a checkpoint's name from it: a kill in the middle must not leave half of one under that."""
    aside = path.with_name(f".{path.name}{_OLD}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)
    return aside


def _remove(aside: Path) -> None:
    (aside / NOTE).unlink(missing_ok=True)  # first, so that what is left of it is not brought back
    shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    """Wait until all of a directory is on disk: a rename must not overtake what it names."""
    paths: Iterable[Path] = (directory, *directory.rglob("*"))
    for path in paths:
        sync(path)
