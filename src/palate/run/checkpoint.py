"""One checkpoint: its position within a method, its files, and its learners."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.journal import key_of
from palate.learn import Learner
from palate.learn.state import require_fit, restore_state
from palate.run.moves import NOTE, digest_of


@dataclass(frozen=True)
class Position:
    """A position of a run within its method.

    A method is a sequence of stages, each a loop of steps. Every finished stage has a checkpoint of its end,
    so a resumed run, which starts the method from the beginning, skips finished stages immediately.
    """

    stage: int
    """Index of the stage from 0, in the order of the method."""
    step: int
    """Number of finished steps in the stage."""
    steps_before: int
    """Number of steps in all earlier stages."""
    metrics: int
    """Number of rows of metrics written."""
    ended: bool
    """True if the stage is finished."""
    within: bool = False
    """True if the KL was measured here and lies within its bound."""
    final: bool = False
    """True if training ended here, because the KL passed its bound later."""
    reward: float | None = None
    """Mean reward that was measured here, to keep the best checkpoint; None if it was not."""

    @property
    def steps(self) -> int:
        """Number of finished steps in the run."""
        return self.steps_before + self.step

    def as_final(self, metrics: int) -> Position:
        """Return the position as the end of training, after so many rows of metrics."""
        return replace(self, metrics=metrics, ended=True, final=True)


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
        """Return whether the checkpoint has these learners with their current number of updates."""
        first, *others = learners
        return self.learner["version"] == first.version and all(
            other.name in self.beside and self.beside[other.name]["version"] == other.version
            for other in others
        )

    def restore(self, learners: Sequence[Learner]) -> None:
        """Restore all learners, or none of them if there is an error.

        Raises:
            RunError: the checkpoint has other learners, or a state does not fit its learner.
        """
        first, *others = learners
        names = {other.name for other in others}
        if names != self.beside.keys():
            held, expected = (", ".join([first.name, *sorted(others)]) for others in (self.beside, names))
            raise RunError(
                f"checkpoint {str(self.path)!r} holds the learners {held}, expected {expected}; start over "
                "with --overwrite, or use another --output"
            )
        numbers = {first.name: self.learner, **self.beside}
        for learner, place in places(self.path, learners):
            require_fit(learner, place)
        for learner, place in places(self.path, learners):
            restore_state(learner, place, numbers[learner.name])

    def check(self, run: str) -> None:
        """Raise RunError unless the checkpoint is complete, intact and part of this run."""
        if self.run != run:
            raise RunError(
                f"checkpoint {str(self.path)!r} belongs to another run; move it away to resume without it"
            )
        for name, (size, digest) in self.files.items():
            path = self.path / name
            actual = path.stat().st_size if path.is_file() else None
            if actual != size or digest_of(path) != digest:
                problem = "is missing" if actual is None else "has changed"
                raise RunError(
                    f"checkpoint {str(self.path)!r} is damaged: {name} {problem}; restore a good copy, or "
                    "delete that directory to resume from the previous checkpoint"
                )


def places(directory: Path, learners: Sequence[Learner]) -> Iterator[tuple[Learner, Path]]:
    """Yield each learner with its directory in a checkpoint."""
    first, *others = learners
    yield first, directory
    yield from ((other, directory / other.name) for other in others)


def note_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the note in a checkpoint's directory, which says what it holds."""
    note = {
        "run": checkpoint.run,
        "position": asdict(checkpoint.position),
        "learner": checkpoint.learner,
        "files": {name: list(facts) for name, facts in checkpoint.files.items()},
    }
    if checkpoint.beside:
        note["beside"] = dict(checkpoint.beside)
    return note | {"key": key_of(note)}


def read_note(path: Path) -> Checkpoint:
    """Return the checkpoint of a directory by its note."""
    try:
        note = json.loads((path / NOTE).read_text(encoding="utf-8"))
        if note.pop("key") != key_of(note):
            raise ValueError("its content has changed")
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
            f"checkpoint {str(path)!r} is incomplete or not from Palate: it has no {NOTE}; move it away to "
            "resume without it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"checkpoint {str(path)!r} is damaged: {NOTE} cannot be read ({error}); delete that directory to "
            "resume from the previous checkpoint"
        ) from None
