"""The parts of a run that several processes share: process 0 has them, the others get its answers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from palate.annotate import Annotator
from palate.config import RunConfig
from palate.learn import Learner
from palate.learn.shards import save_part
from palate.learn.shared import share_state
from palate.learn.state import save_state
from palate.memory import Logps, Memory, Purpose
from palate.model.rollouts import packed, unpacked
from palate.run.checkpoint import Checkpoint, Position
from palate.run.checkpoints import Checkpoints
from palate.run.status import sync
from palate.rundir.writing import writing
from palate.types import Completion, Group, Prompt
from palate.world import current


def led(make: Callable[[], Annotator | None]) -> Annotator | None:
    """Return an annotator that works in process 0, whose rewards all processes get.

    A judge costs money, and a function may answer at random, so only one process asks them.

    Args:
        make: returns the annotator, or None; called in process 0 only.
    """
    world = current()
    if world.size == 1:
        return make()
    own: list[Annotator] = []

    def making() -> bool:
        made = make()
        own.extend([] if made is None else [made])
        return made is not None

    if not world.lead("the annotator", making):
        return None

    def annotated(groups: Sequence[Group]) -> list[Group]:
        def rewards() -> list[Any]:
            return [[group.rewards, dict(group.parts)] for group in own[0](groups)]

        answers = world.lead("annotate", rewards)
        return [
            replace(group, rewards=tuple(numbers), parts={k: tuple(v) for k, v in parts.items()})
            for group, (numbers, parts) in zip(groups, answers, strict=True)
        ]

    return annotated


class SharedMemory:
    """The memory of several processes: process 0 reads and writes the journal.

    Every process makes the same calls with the same keys.

    Args:
        journal: the run's journal, which only process 0 uses.
    """

    def __init__(self, journal: Memory) -> None:
        self._journal = journal

    def completions(self, key: str) -> list[tuple[Completion, ...]] | None:
        """Return a chunk as process 0 knows it."""

        def known() -> list[list[Any]] | None:
            chunk = self._journal.completions(key)
            return None if chunk is None else [[packed(c) for c in group] for group in chunk]

        answer = current().lead("recall samples", known)
        return None if answer is None else [tuple(unpacked(c) for c in group) for group in answer]

    def keep_completions(
        self,
        key: str,
        version: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        purpose: Purpose = "completion",
    ) -> None:
        """Keep a chunk, in process 0."""
        if current().leads:
            self._journal.keep_completions(key, version, prompts, completions, purpose=purpose)

    def logps(self, keys: Sequence[str]) -> list[Logps] | None:
        """Return log-probabilities as process 0 knows them."""

        def known() -> list[Any] | None:
            rows = self._journal.logps(keys)
            return None if rows is None else [[len(row) for row in rows], np.concatenate(rows)]

        answer = current().lead("recall logps", known)
        if answer is None:
            return None
        lengths, flat = answer
        return np.split(flat, np.cumsum(lengths)[:-1])

    def keep_logps(self, version: int, logps: Mapping[str, Logps]) -> None:
        """Keep log-probabilities, in process 0."""
        if current().leads:
            self._journal.keep_logps(version, logps)


class SharedCheckpoints:
    """The checkpoints of several processes; see `Checkpoints`.

    Process 0 writes and reads the weights of learners with a copy in each process, and sends the others their
    state. Of a sharded learner, each process writes and reads its own part, in a directory that all see.

    Args:
        own: the checkpoints in process 0; None in the others.
    """

    def __init__(self, own: Checkpoints | None) -> None:
        self._own = own

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint with the most steps, in process 0."""
        return self._own.latest if self._own is not None else None

    def is_due(self, step: int) -> bool:
        """Return whether to save now, by the clock of process 0."""
        return current().lead("checkpoint due", lambda: self._checkpoints.is_due(step))

    def holding(self, *learners: Learner) -> Path | None:
        """Return the latest checkpoint that has these learners."""

        def path() -> str | None:
            own = self._checkpoints.holding(*learners)
            return None if own is None else str(own)

        there = current().lead("checkpoint there", path)
        return None if there is None else Path(there)

    def restore(self, stage: int, *learners: Learner) -> Position | None:
        """Restore learners in every process."""
        return self._restored(
            "restore",
            learners,
            lambda: self._checkpoints.restore(stage, *learners),
            lambda: self._checkpoints.of_stage(stage),
        )

    def restore_best(self, *learners: Learner) -> Position | None:
        """Restore learners in every process from the checkpoint with the best measured reward."""
        return self._restored(
            "best",
            learners,
            lambda: self._checkpoints.restore_best(*learners),
            lambda: self._checkpoints.best(),
        )

    def end_within(self, metrics: int, *learners: Learner) -> Position:
        """Put the learners of every process back to the last checkpoint within the bound."""
        if not _any_sharded(learners):
            position = self._moved("end", learners, lambda: self._checkpoints.end_within(metrics, *learners))
            assert position is not None
            return position
        checkpoint = self._found("end", lambda: self._checkpoints.within())
        assert checkpoint is not None
        checkpoint.restore(learners)
        position = checkpoint.position.as_final(metrics)
        self.save(position, *learners)
        current().lead("end", lambda: self._checkpoints.drop_after(position))
        return position

    def save(self, position: Position, *learners: Learner) -> Path:
        """Write a checkpoint."""
        world = current()
        if not _any_sharded(learners):
            return Path(world.lead("save", lambda: str(self._checkpoints.save(position, *learners))))
        parts = Path(world.lead("save", lambda: str(self._checkpoints.prepare(position, *learners))))
        for learner in learners:
            _write_part(learner, parts / learner.name)
        world.gather("parts written", None)

        def saved() -> str:
            path = self._checkpoints.save(position, *learners, parts=parts)
            shutil.rmtree(parts, ignore_errors=True)
            return str(path)

        return Path(world.lead("save", saved))

    @property
    def _checkpoints(self) -> Checkpoints:
        assert self._own is not None, "only process 0 has the files"
        return self._own

    def _restored(
        self,
        name: str,
        learners: Sequence[Learner],
        move: Callable[[], Position | None],
        find: Callable[[], Checkpoint | None],
    ) -> Position | None:
        """Restore learners in every process: with their whole state, or each with its own part."""
        if not _any_sharded(learners):
            return self._moved(name, learners, move)
        checkpoint = self._found(name, find)
        if checkpoint is None:
            return None
        checkpoint.restore(learners)
        return checkpoint.position

    def _found(self, name: str, find: Callable[[], Checkpoint | None]) -> Checkpoint | None:
        """Return a checkpoint that process 0 finds and checks."""

        def facts() -> list[Any] | None:
            c = find()
            return None if c is None else [str(c.path), asdict(c.position), c.learner, c.run, dict(c.beside)]

        values = current().lead(name, facts)
        if values is None:
            return None
        path, position, learner, run, beside = values
        return Checkpoint(Path(path), Position(**position), learner, run, {}, beside)

    def _moved(
        self, name: str, learners: Sequence[Learner], move: Callable[[], Position | None]
    ) -> Position | None:
        """Let process 0 change its learners, and give the others the same state."""

        def moving() -> dict[str, Any] | None:
            position = move()
            return None if position is None else asdict(position)

        position = current().lead(name, moving)
        if position is None:
            return None
        for learner in learners:
            share_state(learner)
        return Position(**position)


def _any_sharded(learners: Sequence[Learner]) -> bool:
    return any(learner.model.sharded for learner in learners)


def _write_part(learner: Learner, directory: Path) -> None:
    """Write this process's files of a learner, and wait until they are on disk."""
    with writing(directory):
        learner.save(directory)
        if learner.model.sharded:
            sync(save_part(learner, directory))
        elif current().leads:
            save_state(learner, directory)


def open_checkpoints(directory: Path, run: str, cfg: RunConfig) -> Checkpoints | SharedCheckpoints:
    """Return the checkpoints of a run for this process; see `Checkpoints.of_run`."""
    world = current()
    if world.size == 1:
        return Checkpoints.of_run(directory, run, cfg)
    own: list[Checkpoints] = []

    def opening() -> None:
        own.append(Checkpoints.of_run(directory, run, cfg))

    world.lead("checkpoints", opening)
    return SharedCheckpoints(own[0] if own else None)
