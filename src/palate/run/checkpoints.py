"""Checkpoints of a run: written completely or not at all, and checked before use.

A checkpoint holds one or several learners, such as a policy and a critic. The first learner is the run's
model; its files are directly in the checkpoint's directory, in the layout of the hub. Each other learner has
a subdirectory with its name.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from palate.config import RunConfig
from palate.errors import AGAIN, RunError
from palate.learn import Learner
from palate.learn.shards import state_files
from palate.learn.state import save_state, state_bytes
from palate.run.checkpoint import Checkpoint, Position, note_of, places, read_note
from palate.run.moves import NOTE, digest_of, put_aside, remove, sync_tree, tidy
from palate.run.status import sync, write_json
from palate.rundir.writing import writing

PATIENCE = 50
"""Default time between checkpoints, as a multiple of the time to write one: checkpoints cost 2 %."""

SPARE = 32 << 20
"""Free space to leave for the journal and the metrics, in bytes."""


class Checkpoints:
    """The checkpoints in a run's directory.

    Args:
        directory: `checkpoints/` of the run.
        run: the run's id.
        keep: number of checkpoints to keep, in addition to the ends of stages.
        every: steps between checkpoints; None for checkpoints that take 2 % of the time.

    Raises:
        RunError: a checkpoint cannot be read, or the latest is damaged or belongs to another run.
    """

    def __init__(self, directory: Path, run: str, *, keep: int, every: int | None = None) -> None:
        self.directory = directory
        self._run = run
        self._keep = keep
        self._every = every
        self._saved = time.perf_counter()
        tidy(directory)
        self._existing = sorted(
            (read_note(p) for p in directory.glob("step-*")), key=lambda c: c.position.steps
        )
        self._cost = 0.0  # seconds to write the last checkpoint
        if self._existing:
            self._existing[-1].check(run)

    @classmethod
    def of_run(cls, directory: Path, run: str, cfg: RunConfig) -> Self:
        """Return the checkpoints of a run in a directory, kept and taken as the configuration says."""
        return cls(directory / "checkpoints", run, keep=cfg.keep_checkpoints, every=cfg.checkpoint_every)

    @property
    def latest(self) -> Checkpoint | None:
        """The checkpoint with the most steps; None without checkpoints."""
        return self._existing[-1] if self._existing else None

    def end_within(self, metrics: int, *learners: Learner) -> Position:
        """End training at the last checkpoint whose KL lies within its bound: put learners back to it, note
        that it is final, and remove the later ones.

        Args:
            metrics: rows of metrics that were written until the end of training.
            learners: as in `save`.

        Raises:
            RunError: it is damaged or does not fit the learners, or the note cannot be written.
        """
        checkpoint = self.within()
        checkpoint.restore(learners)
        position = checkpoint.position.as_final(metrics)
        self.save(position, *learners)
        self.drop_after(position)
        return position

    def within(self) -> Checkpoint:
        """Return the last checkpoint whose KL lies within its bound, checked."""
        checkpoint = self._last_within()
        assert checkpoint is not None, "a bounded run saves its start"
        checkpoint.check(self._run)
        return checkpoint

    def drop_after(self, position: Position) -> None:
        """Remove the checkpoints after a position."""
        for later in [c for c in self._existing if c.position.steps > position.steps]:
            remove(put_aside(later.path))
            self._existing.remove(later)

    def restore_best(self, *learners: Learner) -> Position | None:
        """Restore learners from the checkpoint with the best measured reward; None if none was measured.

        Later checkpoints stay. The earliest of equal ones counts.

        Raises:
            RunError: it is damaged or does not fit the learners.
        """
        best = self.best()
        if best is None:
            return None
        best.check(self._run)
        best.restore(learners)
        return best.position

    def is_due(self, step: int) -> bool:
        """Return whether to save now, after a step of the stage (counted from 1)."""
        if self._every is not None:
            return step % self._every == 0
        return time.perf_counter() - self._saved >= PATIENCE * self._cost

    def holding(self, *learners: Learner) -> Path | None:
        """Return the latest checkpoint that has these learners in their current state, or None."""
        return next((c.path for c in reversed(self._existing) if c.holds(learners)), None)

    def restore(self, stage: int, *learners: Learner) -> Position | None:
        """Restore learners from the last checkpoint of a stage; return None if the stage has none.

        Raises:
            RunError: the checkpoint is damaged or belongs to another run or to other learners; the learners
                are unchanged.
        """
        checkpoint = self.of_stage(stage)
        if checkpoint is None:
            return None
        checkpoint.restore(learners)
        return checkpoint.position

    def of_stage(self, stage: int) -> Checkpoint | None:
        """Return the last checkpoint of a stage, checked; None if the stage has none."""
        own = [c for c in self._existing if c.position.stage == stage]
        if not own:
            if self._existing and self._existing[-1].position.stage > stage:
                raise RunError(
                    f"{str(self.directory)!r} lacks the checkpoint at the end of stage {stage + 1}; restore "
                    "it, or start over with --overwrite"
                )
            return None
        own[-1].check(self._run)
        return own[-1]

    def prepare(self, position: Position, *learners: Learner) -> Path:
        """Return an empty directory, with one per learner, for files that several processes write.

        Raises:
            RunError: the disk is full, or the directory cannot be made.
        """
        parts = self.directory / f".step-{position.steps}.parts"
        with writing(parts):
            shutil.rmtree(parts, ignore_errors=True)
            self.directory.mkdir(parents=True, exist_ok=True)
            self._require_room(learners, self.directory / f"step-{position.steps}")
            for learner in learners:
                (parts / learner.name).mkdir(parents=True)
        return parts

    def save(self, position: Position, *learners: Learner, parts: Path | None = None) -> Path:
        """Write learners in Hugging Face layout with their states; then remove older checkpoints.

        Args:
            position: of the run.
            learners: the run's model first.
            parts: the directory of `prepare`, if the files are there already.

        Raises:
            RunError: the disk is full, or the checkpoint cannot be written. Earlier checkpoints are kept.
        """
        assert len({learner.name for learner in learners}) == len(learners), "learners need different names"
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
            numbers = [_write(learner, place, parts) for learner, place in places(scratch, learners)]
            files = {
                p.relative_to(scratch).as_posix(): (p.stat().st_size, digest_of(p))
                for p in sorted(scratch.rglob("*"))
                if p.is_file()
            }
            beside = {learner.name: own for learner, own in zip(learners[1:], numbers[1:], strict=True)}
            checkpoint = Checkpoint(target, position, numbers[0], self._run, files, beside)
            write_json(scratch / NOTE, note_of(checkpoint))
            sync_tree(scratch)
            aside = put_aside(target) if target.exists() else None
            os.replace(scratch, target)
            sync(self.directory)
            if aside is not None:
                remove(aside)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RunError(
                f"checkpoint {str(target)!r} cannot be written: {reason}; {self._safe()}"
            ) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # after success it does not exist
        self._existing = [c for c in self._existing if c.path != target] + [checkpoint]
        self._prune()
        self._saved = time.perf_counter()
        self._cost = self._saved - began
        return target

    # -- inside ------------------------------------------------------------------------------------

    def best(self) -> Checkpoint | None:
        """Return the checkpoint with the best measured reward; None if none was measured."""
        rated = [c for c in self._existing if c.position.reward is not None]
        return max(rated, key=lambda c: (c.position.reward or 0.0, -c.position.steps), default=None)

    def _last_within(self) -> Checkpoint | None:
        within = [c for c in self._existing if c.position.within]
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
        safe = f"everything up to step {self.latest.position.steps}" if self.latest else "journal.db"
        return f"{safe} is safe: free some space and {AGAIN}"

    def _prune(self) -> None:
        """Remove old checkpoints.

        The ends of stages stay, since a later stage may start from them, and so do the last checkpoint within
        the bound of the KL and the one with the best reward.
        """
        kept = (self._last_within(), self.best())
        passing = [c for c in self._existing if not c.position.ended and c not in kept]
        for old in passing[: -self._keep]:
            remove(put_aside(old.path))
            self._existing.remove(old)


def _write(learner: Learner, directory: Path, parts: Path | None) -> dict[str, int]:
    directory.mkdir(exist_ok=True)
    if parts is None:
        learner.save(directory)
        return save_state(learner, directory)
    for file in (parts / learner.name).iterdir():
        os.replace(file, directory / file.name)
    state_files(directory)  # a machine that does not share the directory has written elsewhere
    return learner.numbers()
