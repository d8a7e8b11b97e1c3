"""A run: its directory, its randomness, its clock. It never touches data or losses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from palate.annotate import Annotator
from palate.config import RunConfig
from palate.errors import NonFiniteError, RunError
from palate.learn import Learner
from palate.learn.learner import POLICY
from palate.learn.state import fingerprint
from palate.model.rollouts import unobserved
from palate.run.annotating import journaled
from palate.run.checkpoints import Checkpoints, Position
from palate.run.clock import Clock
from palate.run.directory import RunDirectory, now_text
from palate.run.display import Display
from palate.run.exports import earlier_summary, remove_exports, write_exports
from palate.run.files import writing
from palate.run.metrics import Metrics, MetricsLog
from palate.run.status import write_status
from palate.run.trackers import check_trackers
from palate.run.watch import save_batch
from palate.rundir import Status, read_status
from palate.types import Group


class Run:
    """The directory of one run and what is written there as it goes.

    `config.json` comes first, with versions, processor and seed. `journal.db` keeps what was sampled,
    annotated and measured, as it comes; `metrics.jsonl` has a row per step; `checkpoints/step-N/` appear
    whole or not at all; `summary.json` ends it. Used as a context manager.

    A directory with a run of the same configuration is gone on with: the method is run from its beginning,
    what it asks for again comes out of the journal, and `steps` leaves out what is done. On the same
    processor with the same settings that ends in the same weights, bit for bit.

    Attributes:
        directory: where it is.
        journal: what is kept; attach it by `attach` and `annotator`.

    Args:
        cfg: the run's configuration; all of it is written, `output`, `seed` and the like are used.
        method: name of the method, for the directory's default name and for the reader.
        display: where progress is shown; nowhere by default.

    Raises:
        RunError: the directory holds a run that is another one, damaged, or in the hands of another process;
            or it cannot be written.
        ConfigError: a tracker of `report_to` is unknown or not installed.
    """

    def __init__(self, cfg: RunConfig, *, method: str, display: Display | None = None) -> None:
        self.cfg = cfg
        self.method = method
        self.directory = cfg.output or Path("runs") / method
        self.display = display or Display(quiet=True)
        check_trackers(cfg.report_to)  # before a run is replaced
        self._clock = Clock()
        self._status = Status("running")
        with ExitStack() as undo:
            self._place = RunDirectory(self.directory, method, cfg)
            undo.callback(self._place.release)
            self._checkpoints = Checkpoints(
                self.directory / "checkpoints",
                self._place.id,
                keep=cfg.keep_checkpoints,
                every=cfg.checkpoint_every,
            )
            self.journal = self._place.journal(self._checkpoints.latest)
            undo.callback(self.journal.close)
            self._metrics = MetricsLog(self.directory, self.journal, cfg)
            undo.pop_all()
        self._stage = self._base = self._done = self._new_steps = 0
        self._within = False
        self._attached: list[Learner] = []
        self._measured: dict[str, Metrics] = {}
        self._taken_up = False
        if not self._place.resumed:
            self._take_up()

    def __enter__(self) -> Self:
        """Start showing progress."""
        self.display.start(self.method, self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open; what was written stays."""
        with ExitStack() as closing:  # each of them, whatever becomes of the others
            closing.callback(self._place.release)
            closing.callback(self.journal.close)
            for learner in self._attached:  # it may be used on, and then keeps nothing
                learner.observe, learner.memory = unobserved, None
            if error is not None:
                closing.enter_context(suppress(OSError))  # the first error is the one to tell
            closing.callback(self._metrics.close)
            self.display.stop()
            self._end(error)

    # -- randomness --------------------------------------------------------------------------------

    def seed(self, *names: str | int) -> int:
        """A seed for one purpose, such as `run.seed("sample", step)`; purposes do not share streams."""
        text = ":".join(map(str, (self.cfg.seed, *names)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")

    # -- what works in the run ---------------------------------------------------------------------

    def attach(self, *learners: Learner) -> None:
        """Have learners report their work and keep their samples here; the weights they start from are noted.

        Give all learners of a run at once: what is refused is refused before the run resumes.

        Raises:
            RunError: the run began with other weights of one of them.
        """
        for learner in learners:
            learner.observe, learner.memory = self.observe, self.journal
            self._attached.append(learner)
            whose = "the model" if learner.name == POLICY else f"the {learner.name}'s model"
            told = f"{whose} {learner.model.source}"
            self.require_same(f"the weights of {learner.name}", fingerprint(learner), told)
        self._take_up()

    def annotator(self, annotate: Annotator, *, name: str = "reward") -> Annotator:
        """The annotator, with its answers kept in the journal; `name` tells several of them apart."""
        kept = journaled(annotate, self.journal, name=name, observe=self.observe, say=self.display.say)

        def annotated(groups: Sequence[Group]) -> list[Group]:
            self._take_up()
            return kept(groups)

        return annotated

    def require_same(self, name: str, value: str, told: str) -> None:
        """Note something that a run must not change while it is interrupted.

        Args:
            name: of the fact.
            value: what it is, or a hash of that.
            told: what a message calls it.

        Raises:
            RunError: it was something else when the run began.
        """
        known = self.journal.fact(name)
        if known is None:
            self.journal.keep_fact(name, value)
        elif known != value:
            raise RunError(
                f"{told} is not what the run in {str(self.directory)!r} began with (hash {value[:12]}, was "
                f"{known[:12]}); bring the old one back, or start anew with --overwrite or another --output"
            )

    # -- clock -------------------------------------------------------------------------------------

    def observe(self, stage: str, amount: int = 0) -> None:
        """Told by the parts when they have done some work: the time since the last call was theirs.

        Args:
            stage: `sample`, `annotate`, `learn` or `evaluate`.
            amount: tokens (sample, learn) or completions (annotate) done.
        """
        self.display.working(stage, self._clock.report(stage, amount))

    def steps(self, count: int, *learners: Learner) -> Iterator[int]:
        """The numbers of the steps to do: one stage of a method.

        Learners are saved together now and then, and restored together where the run was interrupted; the
        steps that are done by then are left out. The first learner is the run's model, the others, such as a
        critic, are saved in subdirectories of its checkpoint.

        Raises:
            RunError: the stage's checkpoint is damaged, or has other learners.
        """
        self._take_up()
        stage, self._stage = self._stage, self._stage + 1
        base = self._base
        self.display.expect(base + count)
        there = self._checkpoints.restore(stage, *learners) if learners else None
        first = 0 if there is None else there.step
        if there is not None:
            done = f"{there.steps} of {base + count} steps are done already"
            self.display.step(there.steps)
            self.display.say(done if first >= count else f"going on after step {there.steps}")
        for step in range(first, count):
            self._begin_step(base + step, base + count)
            self._within = True
            yield step
            self._within = False
            self._status = replace(self._status, step=self._done)
            if learners and (step + 1 == count or self._checkpoints.is_due(step + 1)):
                position = Position(stage, step + 1, base, self._metrics.count, step + 1 == count)
                self._save(position, *learners)
        self._base = self._done = base + max(first, count)
        self._status = replace(self._status, step=self._base, steps=self._base)
        self.journal.place = f"after step {self._base}"

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all of its starts."""
        return self._clock.seconds

    # -- records -----------------------------------------------------------------------------------

    def log(self, step: int, *metrics: Metrics, samples: Sequence[Group] = ()) -> None:
        """Write a step's metrics. `num_tokens` is summed up over the run, as TRL does.

        Args:
            step: counted from 0 in its stage; written counted from 1 over the run.
            metrics: numbers by name; one mapping per part of the method.
            samples: completions of this step, one of which is shown.

        Raises:
            RunError: for many steps in a row there was nothing to learn from.
        """
        self._take_up()
        row: dict[str, float] = {"step": self._base + step + 1}
        for part in metrics:
            row |= part
        row = self._metrics.sum_tokens(row) | self._clock.metrics()
        self._write(row)
        self.display.metrics(row, samples)
        self._metrics.require_pairs(row)

    def measure(self, name: str, compute: Callable[[], Metrics]) -> Metrics:
        """Numbers that belong to no step's work, such as a held-out measurement: computed once, and written.

        Args:
            name: of what is measured; with the steps done by now, the present one included, it says whether
                the run knows the numbers.
            compute: asked if it does not.
        """
        self._take_up()
        key = f"{name} after step {self._done}"
        known = self.journal.metrics_of(key)
        found = {name: value for name, value in known.items() if name != "step"} if known else compute()
        if known is None:
            self._write({"step": self._done, **found}, key=key)
        self._measured[key] = found
        return found

    @property
    def measured(self) -> list[Metrics]:
        """What `measure` gave, in order."""
        return list(self._measured.values())

    def save(self, *learners: Learner) -> Path:
        """The checkpoint of learners as they are now: `checkpoints/step-N`, in Hugging Face layout.

        The first learner is the run's model; see `steps`.

        Raises:
            RunError: it cannot be written.
        """
        assert not self._within, "a step that is not done cannot be gone on from"
        self._take_up()
        if (there := self._checkpoints.holding(*learners)) is not None:
            return there
        position = Position(self._stage, 0, self._base, self._metrics.count, ended=True)
        return self._save(position, *learners)

    def finish(self, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write `summary.json`, held-out samples, and all completions as `completions.parquet`.

        A run that was finished before and had nothing left to do keeps its summary.

        Returns:
            The summary that is there now.
        """
        self._take_up()
        if self._new_steps == 0 and (there := earlier_summary(self.directory)) is not None:
            return there
        self._place.keep()
        with writing(self.directory / "summary.json"):
            write_exports(self.directory, summary, samples, self.journal)
        return dict(summary)

    # -- inside ------------------------------------------------------------------------------------

    def _take_up(self) -> None:
        """Begin; or go on where a run was left, with journal and metrics as they were at the last checkpoint.

        What is refused is refused before that, and leaves the directory as it was.
        """
        if self._taken_up:
            return
        self._taken_up = True
        if self._place.resumed:
            self._come_back()
        self._metrics.begin()
        self._note()

    def _come_back(self) -> None:
        latest, changes = self._checkpoints.latest, self._place.changes
        rows, version = (latest.position.metrics, latest.learner["version"]) if latest else (0, 0)
        self.journal.rewind(rows, version if changes else None)
        self._metrics.restore()
        with writing(self.directory / "config.json"):
            self._place.settle()
        if changes:
            self.display.say(f"not the same to the last bit from here on: {'; '.join(changes)}")
        with suppress(RunError):  # it was killed before it had a status
            self._status = replace(read_status(self.directory), state="running", reason="")
        self._clock.before = self._status.seconds

    def _end(self, error: BaseException | None) -> None:
        if not self._taken_up:
            return  # it was refused, or stopped, before it did anything
        if error is None:
            self._status = replace(self._status, state="finished")
        elif isinstance(error, KeyboardInterrupt):
            self._status = replace(self._status, state="interrupted")
        else:
            self._status = replace(self._status, state="failed", reason=str(error) or type(error).__name__)
        if isinstance(error, NonFiniteError):
            save_batch(self.directory / "nonfinite.jsonl", error)
        if isinstance(error, KeyboardInterrupt):
            latest = self._checkpoints.latest
            where = f" after step {latest.position.steps}" if latest else ""
            self.display.say(
                f"stopped at step {self._status.step}; run the same command again"
                f"{', without --overwrite,' if self.cfg.overwrite else ''} to go on{where}"
            )
        with nullcontext() if error is None else suppress(RunError):  # the first error is the one to tell
            self._note()

    def _note(self) -> None:
        """Write the status."""
        self._status = replace(self._status, seconds=round(self.seconds, 1), updated=now_text())
        with writing(self.directory / "status.json"):
            write_status(self.directory, self._status)

    def _begin_step(self, step: int, steps: int) -> None:
        """Note that a step of so many begins, counted from 0 over the run."""
        self._clock.begin_step()
        self.display.step(step)
        self.journal.place = f"step {step + 1}"
        self._status = replace(self._status, step=step, steps=steps)
        self._note()
        if self._new_steps == 0:  # what told of the run's end tells of it no more
            with writing(self.directory / "summary.json"):
                remove_exports(self.directory)
        self._new_steps += 1
        self._done = step + 1

    def _save(self, position: Position, *learners: Learner) -> Path:
        path = self._checkpoints.save(position, *learners)
        self._place.keep()
        return path

    def _write(self, row: Metrics, *, key: str | None = None) -> None:
        self._metrics.write(row, key=key)
        self._place.keep()
