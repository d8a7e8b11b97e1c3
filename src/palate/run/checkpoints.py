"""Checkpoints of a run: written whole or not at all, checked before they are used.

A checkpoint holds one learner or several, such as a critic beside a policy. The first is the run's model and
lies in the checkpoint's own directory, as a model of the hub does; each other has a subdirectory of its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from palate.errors import AGAIN, RunError
from palate.journal import key_of
from palate.learn import Learner
from palate.learn.state import require_fit, restore_state, save_state, state_bytes
from palate.run.status import sync, write_json

NOTE = "checkpoint.json"
"""File of a checkpoint that says where in the run it is, and the size and hash of every other file."""

PATIENCE = 50
"""Without a fixed interval, the time between checkpoints is 50 times that of writing one: they cost 2 %."""

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
    within: bool = False
    """The KL was measured here, and lies within its bound."""
    final: bool = False
    """Training ended here, since the KL passed its bound later on."""

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
    """Numbers of the first learner, for `restore_state`."""
    run: str
    files: dict[str, tuple[int, str]]
    """Size and SHA-256 of every other file."""
    beside: Mapping[str, dict[str, int]] = field(default_factory=dict)
    """Numbers of the other learners by name."""

    def holds(self, learners: Sequence[Learner]) -> bool:
        """Return whether it has these learners, each after as many updates as it has done by now."""
        first, *others = learners
        return self.learner["version"] == first.version and all(
            other.name in self.beside and self.beside[other.name]["version"] == other.version
            for other in others
        )

    def restore(self, learners: Sequence[Learner]) -> None:
        """Put all learners back to where they were saved, or none of them.

        Raises:
            RunError: it has other learners, or a state does not fit its learner.
        """
        first, *others = learners
        names = {other.name for other in others}
        if names != self.beside.keys():
            held, expected = (", ".join([first.name, *sorted(found)]) for found in (self.beside, names))
            raise RunError(
                f"checkpoint {str(self.path)!r} holds the learners {held}; expected {expected}; start again "
                "with --overwrite, or with another --output"
            )
        numbers = {first.name: self.learner, **self.beside}
        for learner, place in _places(self.path, learners):
            require_fit(learner, place)
        for learner, place in _places(self.path, learners):
            restore_state(learner, place, numbers[learner.name])

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
        every: steps between two of them; None for as many as take 2 % of the time.

    Raises:
        RunError: one of them cannot be read, is damaged or belongs to another run.
    """

    def __init__(self, directory: Path, run: str, *, keep: int, every: int | None = None) -> None:
        self.directory = directory
        self._run = run
        self._keep = keep
        self._every = every
        self._saved = time.perf_counter()
        _tidy(directory)
        self._found = sorted((_read(p) for p in directory.glob("step-*")), key=lambda c: c.position.steps)
        self._cost = 0.0  # seconds that the last one took to write
        if self._found:
            self._found[-1].check(run)

    @property
    def latest(self) -> Checkpoint | None:
        """The one of most steps."""
        return self._found[-1] if self._found else None

    def end_within(self, metrics: int, *learners: Learner) -> Position:
        """End training at the last checkpoint whose KL lies within its bound: put learners back to it, note
        that it is final, and remove the later ones.

        Args:
            metrics: rows of metrics that were written until the end of training.
            learners: as in `save`.

        Raises:
            RunError: it is damaged or does not fit the learners, or the note cannot be written.
        """
        checkpoint = self._last_within()
        assert checkpoint is not None, "a bounded run saves its start"
        checkpoint.check(self._run)
        checkpoint.restore(learners)
        position = replace(checkpoint.position, metrics=metrics, ended=True, final=True)
        self.save(position, *learners)
        for later in [c for c in self._found if c.position.steps > position.steps]:
            _remove(_put_aside(later.path))
            self._found.remove(later)
        return position

    def is_due(self, step: int) -> bool:
        """Return whether it is time to save, after a step counted from 1 in its stage."""
        if self._every is not None:
            return step % self._every == 0
        return time.perf_counter() - self._saved >= PATIENCE * self._cost

    def holding(self, *learners: Learner) -> Path | None:
        """The latest one that has these learners as they are now, if there is one."""
        return next((c.path for c in reversed(self._found) if c.holds(learners)), None)

    def restore(self, stage: int, *learners: Learner) -> Position | None:
        """Put learners where they were at the last checkpoint of a stage; None if the stage has none.

        Raises:
            RunError: it is damaged, of another run, or of other learners; none of them has changed then.
        """
        own = [c for c in self._found if c.position.stage == stage]
        if not own:
            if self._found and self._found[-1].position.stage > stage:
                raise RunError(
                    f"{str(self.directory)!r} lacks the checkpoint that ends stage {stage + 1}; bring it "
                    "back, or start anew with --overwrite"
                )
            return None
        own[-1].check(self._run)
        own[-1].restore(learners)
        return own[-1].position

    def save(self, position: Position, *learners: Learner) -> Path:
        """Write learners in Hugging Face layout, with their states to resume from; then remove older ones.

        Raises:
            RunError: there is no room for it, or it cannot be written. The checkpoints before it are kept.
        """
        assert len({learner.name for learner in learners}) == len(learners), "each has a name of its own"
        target = self.directory / f"step-{position.steps}"
        there = self.latest if self.latest and self.latest.path == target else None
        if there is not None and there.position == position and there.holds(learners):
            return target
        began = time.perf_counter()
        scratch = self.directory / f".{target.name}.{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            sync(self.directory.parent)
            self._require_room(learners, target)
            scratch.mkdir()
            numbers = [_write(learner, place) for learner, place in _places(scratch, learners)]
            files = {
                p.relative_to(scratch).as_posix(): (p.stat().st_size, _digest(p))
                for p in sorted(scratch.rglob("*"))
                if p.is_file()
            }
            beside = {learner.name: own for learner, own in zip(learners[1:], numbers[1:], strict=True)}
            made = Checkpoint(target, position, numbers[0], self._run, files, beside)
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
        self._saved = time.perf_counter()
        self._cost = self._saved - began
        return target

    # -- inside ------------------------------------------------------------------------------------

    def _last_within(self) -> Checkpoint | None:
        within = [c for c in self._found if c.position.within]
        return max(within, key=lambda c: c.position.steps, default=None)

    def _require_room(self, learners: Sequence[Learner], target: Path) -> None:
        latest = sum(size for size, _ in self.latest.files.values()) if self.latest else 0
        need = max(latest, sum(map(state_bytes, learners))) + SPARE
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
        """Remove old ones. The end of a stage stays, for a later stage may have to start from it, and so does
        the last one within the bound of the KL.
        """
        passing = [c for c in self._found if not c.position.ended and c is not self._last_within()]
        for old in passing[: -self._keep]:
            _remove(_put_aside(old.path))
            self._found.remove(old)


def _places(directory: Path, learners: Sequence[Learner]) -> Iterator[tuple[Learner, Path]]:
    """Each learner with its directory in a checkpoint."""
    first, *others = learners
    yield first, directory
    yield from ((other, directory / other.name) for other in others)


def _write(learner: Learner, directory: Path) -> dict[str, int]:
    directory.mkdir(exist_ok=True)
    learner.save(directory)
    return save_state(learner, directory)


def _note(checkpoint: Checkpoint) -> dict[str, Any]:
    note = {
        "run": checkpoint.run,
        "position": asdict(checkpoint.position),
        "learner": checkpoint.learner,
        "files": {name: list(facts) for name, facts in checkpoint.files.items()},
    }
    if checkpoint.beside:
        note["beside"] = dict(checkpoint.beside)
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
            note.get("beside", {}),
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
