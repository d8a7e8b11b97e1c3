"""A run: its directory, its seeds and its clock. A run never handles data or losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from palate.annotate import Annotator
from palate.annotate.judges.ledger import Ledger
from palate.config import RunConfig
from palate.data import Account
from palate.errors import BudgetError, NonFiniteError, RunError
from palate.learn import Learner
from palate.learn.state import fingerprint, label_of
from palate.memory import Memory
from palate.model.rollouts import unobserved
from palate.run.accounts import warnings, write_accounts
from palate.run.annotating import journaled
from palate.run.checkpoint import Position
from palate.run.clock import Clock
from palate.run.display import Display
from palate.run.drift import KL, BoundReachedError, Contest, Drift
from palate.run.ending import how_to_resume, refuses
from palate.run.exports import earlier_summary, remove_exports, write_exports
from palate.run.facts import remember, require_same
from palate.run.following import open_directory, open_metrics
from palate.run.metrics import Metrics, without_step
from palate.run.progress import Progress
from palate.run.resuming import resume, resumed_at
from palate.run.seeds import seed_of
from palate.run.shared import SharedMemory, open_checkpoints
from palate.run.trackers import check_trackers
from palate.run.watch import save_batch
from palate.types import Group
from palate.world import cause_of, current


class Run:
    """The directory of one run and the files in it; a context manager.

    `config.json` is written first, with versions, processor and seed. `journal.db` stores samples, rewards
    and measurements as soon as they exist; `metrics.jsonl` has a row per step; `checkpoints/step-N/` are
    written completely or not at all; `summary.json` is written at the end. A run in a directory with a run of
    the same configuration resumes it: the method starts from its beginning, the journal answers repeated
    requests, and `steps` skips finished steps. On the same processor with the same settings, the final
    weights are bit-identical.

    Attributes:
        directory: the run's directory.
        checkpoints: the run's checkpoints, which `steps` and `save` write.
        journal: the run's journal; `memory` is its part for models, which all processes of the run share.
        meter: returns further numbers of each step, such as the cost of a judge.
        settle: called before a checkpoint, to keep results of earlier versions that are under way.
        drift: measures the KL between steps, and ends training where it passes a bound; None for neither.
        contest: compares two policies on the held-out prompts; None without held-out prompts or a reward.

    Args:
        cfg: the run's configuration; all fields are written, those of `RunConfig` are used.
        method: name of the method, for the directory's default name and the description of the run.
        display: shows progress; silent by default.

    Raises:
        RunError: the directory holds another or a damaged run, is in use, or cannot be written.
        ConfigError: a tracker of `report_to` is unknown or not installed.
    """

    def __init__(self, cfg: RunConfig, *, method: str, display: Display | None = None) -> None:
        self.cfg, self.method = cfg, method
        self.directory = cfg.output or Path("runs") / method
        self.world = current()
        self.display = display if display is not None and self.world.leads else Display(quiet=True)
        self.display.penalised = bool(getattr(cfg, "missing_eos_penalty", 0.0))
        check_trackers(cfg.report_to)  # before anything replaces an existing run
        self._clock = Clock()
        self._progress = Progress(self.directory, self._clock, kept=self.world.leads)
        with ExitStack() as undo:
            self._place = open_directory(self.directory, method, cfg)
            undo.callback(self._place.release)
            self.checkpoints = open_checkpoints(self.directory, self._place.id, cfg)
            self.journal = self._place.journal(self.checkpoints.latest, self.display.say)
            undo.callback(self.journal.close)
            self._metrics = open_metrics(self.directory, self.journal, cfg)
            undo.pop_all()
        self._stage = self._base = self._done = self._new_steps = 0
        self._started = self._within = False
        self.drift: Drift | None = None
        self.contest: Contest | None = None
        self._attached: list[Learner] = []
        self._measured: dict[str, Metrics] = {}
        self._ledger: Ledger | None = None
        self._accounts: dict[str, Account] = {}
        self.memory: Memory = self.journal if self.world.size == 1 else SharedMemory(self.journal)
        self.meter: Callable[[], Metrics] = dict
        self.settle: Callable[[], None] = lambda: None
        if not self._place.resumed:
            self._start()

    def __enter__(self) -> Self:
        """Start showing progress."""
        self.display.start(self.method, self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all files; written data stays."""
        with ExitStack() as closing:  # a failure in one does not prevent the others
            closing.callback(self._place.release, refused=refuses(error))
            closing.callback(self.journal.close)
            if self._ledger is not None:
                closing.callback(self._ledger.close)
            for learner in self._attached:  # learners stay usable, without reports and memory
                learner.observe, learner.memory = unobserved, None
            if error is not None:
                closing.enter_context(suppress(OSError))  # report the first error
            closing.callback(self._metrics.close)
            self.display.stop()
            self._end(error and cause_of(error))

    def seed(self, *names: str | int) -> int:
        """Return the seed of one purpose, such as `run.seed("sample", step)`; each has its own stream."""
        return seed_of(self.cfg.seed, *names)

    # -- learners and annotators -------------------------------------------------------------------

    def attach(self, *learners: Learner) -> None:
        """Connect learners to the clock and the journal, and record fingerprints of their weights.

        Attach all learners of a run in one call, so that all are checked before the run resumes.

        Raises:
            RunError: the run started with other weights of a learner.
        """
        for learner in learners:
            learner.observe, learner.memory = self.observe, self.memory
            self._attached.append(learner)
            self.require_same(f"the weights of {learner.name}", fingerprint(learner), label_of(learner))
        self._start()

    def annotator(self, annotate: Annotator, *, name: str | Callable[[], str] = "reward") -> Annotator:
        """Return the annotator with its answers stored in the journal; `name` distinguishes annotators."""
        return journaled(
            annotate, self.journal, name=name, start=self._start, observe=self.observe, say=self.display.say
        )

    def ledger(self, cache: Path | None = None) -> Ledger:
        """Return the ledger of questions to judges and functions; it is part of the journal.

        Args:
            cache: a file of verdicts that several runs share.
        """
        self._ledger = self._ledger or Ledger(self.directory / "journal.db", cache)
        return self._ledger

    @property
    def learners(self) -> Sequence[Learner]:
        """The attached learners, the run's model first."""
        return tuple(self._attached)

    @property
    def id(self) -> str:
        """Identity of the run; it moves with the directory."""
        return self._place.id

    def require_same(self, name: str, value: str, label: str) -> None:
        """Record a fact that must not change between the starts of a run.

        Args:
            name: name of the fact in the journal.
            value: its value, or a hash of its value.
            label: its name in messages.

        Raises:
            RunError: the value was different when the run started.
        """
        self.world.agree(label, value)
        self.world.lead(name, lambda: require_same(self.journal, self.directory, name, value, label))

    def remember(self, name: str, value: str) -> str:
        """Return a value as it was when the run started first; `value` if it starts with this call."""
        return self.world.lead(name, lambda: remember(self.journal, name, value))

    def report_data(self, source: str, account: Account) -> None:
        """Show how much of a data set is used and what is not; write it to config.json and skipped.jsonl.

        Raises:
            RunError: a file cannot be written.
        """
        self._accounts[source] = account
        for line in (*account.overview(), *account.lines()):
            self.display.say(f"{source}: {line}")
        write_accounts(self._place, self._accounts)

    # -- clock -------------------------------------------------------------------------------------

    def observe(self, stage: str, amount: int = 0) -> None:
        """Record work that a component reports: the time since the last report counts for its stage.

        Args:
            stage: `sample`, `annotate`, `learn` or `evaluate`.
            amount: number of tokens (sample, learn) or completions (annotate).
        """
        self.display.working(stage, self._clock.report(stage, amount))

    def steps(self, count: int, *learners: Learner) -> Iterator[int]:
        """Yield the indices of the steps of one stage of a method, without steps finished earlier.

        Checkpoints save all learners together. In a resumed run, the learners are restored from the stage's
        last checkpoint, and its steps are skipped. Learners after the first are saved in subdirectories.

        Raises:
            RunError: the stage's checkpoint is damaged or has other learners.
            BoundReachedError: the KL passed its bound; the learners are at the last checkpoint within it.
        """
        self._start()
        stage, base, self._stage = self._stage, self._base, self._stage + 1
        self.display.expect(base + count)
        first, there = 0, self.checkpoints.restore(stage, *learners) if learners else None
        if there is not None:
            first = there.step
            self.display.step(there.steps)
            self.display.say(resumed_at(there.steps, base + count, finished=first >= count))
        if there is not None and there.final:
            raise self._stopped_by_bound(there.steps)
        if learners and there is None and stage == 0 and self.drift and self.drift.most is not None:
            self._save(Position(0, 0, 0, self._metrics.count, ended=False, within=True), *learners)
        for step in range(first, count):
            self._begin_step(base + step, base + count)
            self._within = True
            yield step
            self._within = False
            self._progress.set(step=self._done)
            last = step + 1 == count
            marks = self._measure_drift(last, *learners)
            if learners and (last or marks or self.checkpoints.is_due(step + 1)):
                self._save(Position(stage, step + 1, base, self._metrics.count, last, **marks), *learners)
        self._stop_at(base + max(first, count))

    @property
    def step_count(self) -> int:
        """Steps done by the stages that are finished."""
        return self._base

    @property
    def last_step(self) -> Metrics | None:
        """The metrics of the last step, also from before an interruption; None before the first step."""
        return self.world.lead("last step", lambda: self._metrics.last_step)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, summed over all of its starts."""
        return self._clock.seconds

    # -- records -----------------------------------------------------------------------------------

    def log(self, step: int, *metrics: Metrics, samples: Sequence[Group] = ()) -> None:
        """Write a step's metrics. `num_tokens` is summed over the run, as in TRL.

        Args:
            step: index in the stage, from 0; the row has the number in the run, from 1.
            metrics: numbers by name; one mapping per part of the method.
            samples: completions of this step; the display shows one of them.

        Raises:
            RunError: too many steps in a row had nothing to learn from.
        """
        self._start()
        row: dict[str, float] = {"step": self._base + step + 1}
        for part in metrics:
            row |= part
        row = self._metrics.sum_tokens(row) | dict(self.meter()) | self._clock.metrics()
        self._write(row)
        self.display.metrics(row, samples)
        if (slow := self._clock.explain_slow_step()) is not None:
            self.display.say(slow)
        self._metrics.require_pairs(row)

    def measure(self, name: str, compute: Callable[[], Metrics]) -> Metrics:
        """Return and write numbers outside the steps, such as a held-out measurement; compute them only once.

        Args:
            name: name of the measurement; a resumed run finds its numbers by this name and the current step.
            compute: computes the numbers if the journal does not have them.
        """
        self._start()
        key = f"{name} after step {self._done}"
        known = self.world.lead("measured before", lambda: self.journal.metrics_of(key))
        with self.journal.at(f"measured after step {self._done}"):
            self._measured[key] = numbers = compute() if known is None else without_step(known)
        if known is None:
            self._write({"step": self._done, **numbers}, key=key)
        return numbers

    @property
    def measured(self) -> list[Metrics]:
        """The results of `measure`, in order."""
        return list(self._measured.values())

    def save(self, *learners: Learner) -> Path:
        """Return a checkpoint of the current learners (`checkpoints/step-N`, Hugging Face layout).

        It is written unless it exists. The first learner is the run's model; see `steps`.

        Raises:
            RunError: the checkpoint cannot be written.
        """
        assert not self._within, "a run cannot be resumed from the middle of a step"
        self._start()
        position = Position(self._stage, 0, self._base, self._metrics.count, ended=True)
        return self.checkpoints.holding(*learners) or self._save(position, *learners)

    def finish(self, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write `summary.json`, held-out samples, and all completions as `completions.parquet`.

        If the run was already finished and did no new steps, its summary is kept. Return the summary there.
        """
        self._start()

        def written() -> dict[str, Any]:
            if self._new_steps == 0 and (there := earlier_summary(self.directory)) is not None:
                return there
            self._place.keep()
            write_exports(self.directory, summary, samples, self.journal)
            for line in warnings(self._accounts):
                self.display.say(line)
            return dict(summary)

        return self.world.lead("finish", written)

    # -- inside ------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the run, or resume it with the journal and the metrics of the last checkpoint.

        Errors that refuse a run come before this, and leave the directory unchanged.
        """
        if self._started:
            return
        self._started = True
        if self._place.resumed and self.world.leads:
            resume(self._place, self.journal, self.checkpoints.latest, self._metrics, self.display.say)
            self._progress.restore()
        self._metrics.begin()
        self._progress.write()

    def _end(self, error: BaseException | None) -> None:
        if not self._started:
            return  # the run was refused or interrupted before it did anything
        if isinstance(error, NonFiniteError) and self.world.leads:
            save_batch(self.directory / "nonfinite.jsonl", error)
        if isinstance(error, KeyboardInterrupt | BudgetError):
            saved = latest.position.steps if (latest := self.checkpoints.latest) else None
            self.display.say(how_to_resume(self._progress.status.step, saved, overwrite=self.cfg.overwrite))
        with nullcontext() if error is None else suppress(RunError):  # report the first error
            self._progress.end(error)

    def _begin_step(self, step: int, steps: int) -> None:
        """Record the start of a step of the run (from 0) out of `steps`."""
        self._clock.begin_step()
        self.display.step(step)
        self.journal.place = f"step {step + 1}"
        self._progress.set(step=step, steps=steps)
        self._progress.write()
        if self._new_steps == 0 and self.world.leads:  # the run is not finished again, so exports are old
            remove_exports(self.directory)
        self._new_steps, self._done = self._new_steps + 1, step + 1

    def _measure_drift(self, last: bool, *learners: Learner) -> dict[str, Any]:
        """Measure KL and reward if due; return marks for a checkpoint. Above the bound, BoundReachedError."""
        drift, done = self.drift, self._done
        if not learners or drift is None or not drift.is_due(done, last=last):
            return {}
        if drift.allows((numbers := self.measure("kl", lambda: drift.numbers(done)))[KL]):
            return drift.marks(numbers)
        step = self.checkpoints.end_within(self._metrics.count, *learners).steps
        self.display.say(drift.explain(numbers[KL], done, step))
        raise self._stopped_by_bound(step)

    def _stop_at(self, step: int) -> None:
        """Record that a stage ended after so many steps of the run."""
        self._base = self._done = step
        self._progress.set(step=step, steps=step)
        self.journal.place = f"after step {step}"

    def _stopped_by_bound(self, step: int) -> BoundReachedError:
        self._stop_at(step)
        return BoundReachedError(f"training ended after step {step}")

    def _save(self, position: Position, *learners: Learner) -> Path:
        self.settle()
        path = self.checkpoints.save(position, *learners)
        self._place.keep()
        return path

    def _write(self, row: Metrics, *, key: str | None = None) -> None:
        self._metrics.write(row, key=key)
        self._place.keep()
