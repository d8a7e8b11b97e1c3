"""The work of `palate pool`: sample and score the prompts of a data set, shard by shard.

A pool is a run. A shard is sampled into `sampled/`, scored, and written to `shards/`, each time completely or
not at all. So a killed pool repeats at most the shards under way: what is in `sampled/` is not sampled again,
the journal has the rewards and verdicts so far, and the file of a shard exists once, whoever writes it. A
vLLM server samples the next shard while the process scores one.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from palate.annotate import Annotator, annotator, with_label_noise
from palate.config import ModelConfig
from palate.data import Account, read_prompts
from palate.errors import DataError, PalateError, RunError
from palate.learn.state import start_hash
from palate.loops import account_of, content_key, once, sample_numbers
from palate.model import LoadedModel, load_model
from palate.model.device import resolve
from palate.pool import (
    Columns,
    Entry,
    Facts,
    annotator_facts,
    read_facts,
    read_shard,
    write_facts,
    write_shard,
)
from palate.pool.facts import (
    LOCAL,
    SAMPLED,
    SHARDS,
    changed_rewards,
    kind_of,
    missing_shards,
    scope_of,
    shard_path,
)
from palate.pooling.config import PoolConfig
from palate.pooling.engine import serving, source_of
from palate.pooling.shards import (
    BegunShard,
    Scoring,
    Source,
    added,
    begin_shard,
    counts_of,
    first_errors,
    scores_anywhere,
    split,
    together,
)
from palate.quiet import quieted
from palate.run import Display, Run, judge_annotator, settle_compiling
from palate.run.judging import model_options
from palate.run.seeds import seed_of
from palate.rundir.files import POOL, PUBLISHED, VERDICTS
from palate.types import Group, Prompt

COSTS = ("judge/verdicts", "judge/tokens", "judge/cost")

MOST_NAMED = 5
"""Bad rows that are shown; the file of their shard has all of them."""


@dataclass(frozen=True)
class Made:
    """A finished pool: its directory, and the numbers of `summary.json`."""

    directory: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """The work of a pool, as far as it is the same in every process.

    Attributes:
        cfg: the options.
        directory: the pool's directory.
        prompts: all prompts.
        shards: the numbers of the prompts of each shard.
        columns: the columns of the files.
        seed: seed of the draws.
        date: the date for chat templates that print it.
    """

    cfg: PoolConfig
    directory: Path
    prompts: Sequence[Prompt]
    shards: Sequence[range]
    columns: Columns
    seed: int
    date: str

    def path(self, shard: int) -> Path:
        """Return the file of a finished shard."""
        return shard_path(self.directory, shard)

    def sampled(self, shard: int) -> Path:
        """Return the file of a shard that is sampled and not scored."""
        return shard_path(self.directory, shard, part=SAMPLED)

    def unsampled(self, facts: Facts) -> list[int]:
        """Return the numbers of the shards that are not sampled yet."""
        return [i for i in missing_shards(self.directory, facts) if not self.sampled(i).exists()]

    def finish(self, shard: int, entries: Sequence[Entry]) -> None:
        """Write a finished shard; then its samples alone are of no more use."""
        write_shard(self.path(shard), entries, self.prompts, self.columns)
        self.sampled(shard).unlink(missing_ok=True)


def make_pool(cfg: PoolConfig, *, display: Display | None = None) -> Made:
    """Sample n completions of each prompt and score them; the same call again resumes.

    Raises:
        PalateError: a mistake that the user can correct; the message says how.
    """
    output = cfg.output or Path("runs") / "pool"
    verdicts = cfg.verdict_cache or (output / VERDICTS if cfg.judge is not None else None)
    cfg = cfg.model_copy(update={"output": output, "verdict_cache": verdicts})
    with quieted(), Run(cfg, method="pool", display=display) as run:
        prompts = _prompts(cfg, run)
        date = run.remember("date of chat templates", datetime.now().isoformat())
        here = not cfg.ray and cfg.rollouts == LOCAL
        most = len(prompts) * cfg.n * cfg.max_new_tokens if here else 0
        cfg = cfg.model_copy(update={"compile": settle_compiling(run, cfg.compile, resolve(cfg)[0], most)})
        work = work_of(cfg, run.directory, prompts, date)
        model = loaded(cfg, date)
        facts = _facts(work, model, run)
        _clean(run.directory)
        with _scoring(cfg, run) as scoring, ExitStack() as ending:
            served = None
            if facts.engine_kind != LOCAL and work.unsampled(facts):
                served = ending.enter_context(serving(cfg, model, run.directory, say=run.display.say))
                facts = _noted(work, facts, served.identity, run)
            if cfg.ray:
                from palate.pooling.rays import on_ray

                del model  # the workers load it themselves
                gc.collect()
                on_ray(work, scoring, run, facts, served)
            else:
                _here(work, model, scoring, run, facts)
        return _finished(work, run)


def read_all(cfg: PoolConfig) -> tuple[list[Prompt], Account]:
    """Read the prompts in the order of the shards, with an account of the data.

    Raises:
        DataError: the data cannot be used.
    """
    account = account_of(cfg)
    rows = read_prompts(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit, account=account)
    return together(once(rows)), account


def work_of(cfg: PoolConfig, directory: Path, prompts: Sequence[Prompt], date: str) -> Work:
    """Return the work of a pool."""
    shards, seed = split(prompts, cfg.prompts_per_shard), seed_of(cfg.seed, "sample", 0)
    return Work(cfg, directory, prompts, shards, Columns(prompts), seed, date)


def loaded(cfg: PoolConfig, date: str) -> LoadedModel:
    """Load the model that samples."""
    model = load_model(cfg.part(ModelConfig), trainable=False)
    model.codec.keep_date(datetime.fromisoformat(date))
    return model


def shown(work: Work, shard: int, entries: Sequence[Entry], run: Run, seconds: float) -> None:
    """Show the numbers of a new shard, and name its bad rows."""
    groups = [Group(work.prompts[e.row], e.completions, e.rewards) for e in entries if e.completions]
    if groups:
        row = {"step": shard + 1, "step_time": seconds, **sample_numbers(groups)}
        run.display.metrics(row, groups)
    bad = first_errors(entries, work.prompts)
    for where, error in bad[:MOST_NAMED]:
        run.display.say(f"shard {shard}: {where}: {error}")
    if len(bad) > MOST_NAMED:
        run.display.say(f"shard {shard}: {len(bad) - MOST_NAMED} more bad rows in {work.path(shard)}")


# ---- Steps -----------------------------------------------------------------------------------------


def _prompts(cfg: PoolConfig, run: Run) -> list[Prompt]:
    prompts, account = read_all(cfg)
    account.use(None)  # the files keep all columns
    run.report_data(cfg.data, account)
    run.require_same("the prompts", content_key(prompts), "the data")
    return prompts


def _clean(directory: Path) -> None:
    """Remove the leftovers of a start that was killed: incomplete files, and adapters for a server."""
    for name in (SHARDS, SAMPLED):
        for part in (directory / name).glob(".*.part"):
            part.unlink(missing_ok=True)
    shutil.rmtree(directory / PUBLISHED, ignore_errors=True)  # each start publishes under new names


def _facts(work: Work, model: LoadedModel, run: Run) -> Facts:
    """Write the facts that the candidates depend on, or check that they are those at the start."""
    cfg = work.cfg
    facts = Facts(
        id=run.id,
        model=cfg.model,
        weights=start_hash(model),
        dtype=str(model.dtype).removeprefix("torch."),
        sampling=cfg.sampling.model_dump(mode="json"),
        n=cfg.n,
        seed=cfg.seed,
        annotator=annotator_facts(cfg),
        scope=scope_of(cfg),
        prompts=len(work.prompts),
        shards=len(work.shards),
        date=work.date,
        engine=kind_of(cfg.rollouts),
    )
    if not (work.directory / POOL).exists():
        write_facts(work.directory, facts)
        return facts
    before = read_facts(work.directory)
    if before.engine_kind != facts.engine_kind:
        if len(work.unsampled(before)) < before.shards:
            raise RunError(
                f"the engine of the pool in {str(work.directory)!r} was {before.engine_kind}, but --rollouts "
                f"is {cfg.rollouts}, whose samples differ; give --rollouts {before.engine_kind}"
                f"{'' if before.engine_kind == LOCAL else ' or vllm:URL'}, or use another --output"
            )
        before = replace(before, engine=facts.engine)  # that engine has sampled nothing
        write_facts(work.directory, before)
    if before.weights != facts.weights:
        raise RunError(
            f"the model {cfg.model} changed since the pool in {str(work.directory)!r} was begun (hash "
            f"{facts.weights[:12]}, was {before.weights[:12]}); restore it, or use another --output"
        )
    if before.annotator != facts.annotator:  # the run has compared the options, so code or models differ
        if len(missing_shards(work.directory, before)) < before.shards:
            changed = ", ".join(changed_rewards(before.annotator, facts.annotator))
            raise RunError(
                f"the reward {changed} changed since the pool in {str(work.directory)!r} was begun; restore "
                "it, or use another --output"
            )
        if cfg.judge is None:
            run.ledger().forget_answers()
        before = replace(before, annotator=facts.annotator)
        write_facts(work.directory, before)
    written = before.shards - len(missing_shards(work.directory, before))
    run.display.say(f"{written} of {before.shards} shards are finished already")
    return before


def _noted(work: Work, facts: Facts, identity: str, run: Run) -> Facts:
    """Add a version of the engine to the facts, and name the change."""
    versions = [] if facts.engine == facts.engine_kind else facts.engine.split(", ")
    if identity in versions:
        return facts
    if versions:
        run.display.say(
            f"the pool was begun with {facts.engine} and continues with {identity}; it will have samples "
            "of both"
        )
    noted = replace(facts, engine=", ".join([*versions, identity]))
    write_facts(work.directory, noted)
    return noted


@contextmanager
def _scoring(cfg: PoolConfig, run: Run) -> Iterator[Scoring]:
    """Open the annotator, whose answers the run stores as they come."""
    scoring = Scoring(None, scope_of(cfg))
    with ExitStack() as ending:
        if cfg.ray and scores_anywhere(cfg):
            pass  # the workers load the reward models themselves
        elif cfg.judge is not None:
            court = judge_annotator(cfg, run)
            ending.callback(court.close)
            scoring.annotate = court
        elif cfg.reward:
            scoring.annotate = _rewards(cfg, run, scoring)
        yield scoring


def _rewards(cfg: PoolConfig, run: Run, scoring: Scoring) -> Annotator:
    annotate = annotator(
        cfg.reward,
        missing_eos_penalty=cfg.annotator_penalty,
        kept=run.ledger(),
        say=run.display.say,
        excuse=scoring.excuse,
        **model_options(cfg),
    )
    # The ledger has the answers of functions as they come. The run's journal would also keep that a row has
    # no reward, and a failure that passes would stay until the code changes.
    return with_label_noise(annotate, cfg.label_noise, seed=run.seed("label noise"))


def _here(work: Work, model: LoadedModel, scoring: Scoring, run: Run, facts: Facts) -> None:
    """Make the missing shards in this process."""
    source = source_of(model, work.cfg.n, work.cfg.sampling, seed=work.seed, observe=run.observe)
    missing = set(missing_shards(work.directory, facts))
    samples = _Samples(work, source, deque(work.unsampled(facts)))
    try:
        for shard in run.steps(len(work.shards)) if missing else ():
            if shard not in missing:
                continue
            began = time.perf_counter()
            if work.sampled(shard).exists():
                entries = read_shard(work.sampled(shard))
            else:
                entries = samples.of(shard)
                if scoring.annotate is not None:
                    write_shard(work.sampled(shard), entries, work.prompts, work.columns)
            entries = scoring(entries, work.prompts)
            run.observe("annotate", sum(len(entry.completions) for entry in entries))
            work.finish(shard, entries)
            shown(work, shard, entries, run, time.perf_counter() - began)
    finally:
        samples.keep()  # none is left without an error


@dataclass
class _Samples:
    """The samples of shards, some of which are begun early if a server samples.

    Attributes:
        work, source: of the pool.
        waiting: the shards that are not begun, in order.
        begun: the shards that are being sampled.
    """

    work: Work
    source: Source
    waiting: deque[int]
    begun: dict[int, BegunShard] = field(default_factory=dict)

    def of(self, shard: int) -> list[Entry]:
        """Return the entries of the first shard that is left, and begin the shards after it."""
        while self.waiting and len(self.begun) <= self.source.ahead:
            i = self.waiting[0]
            try:
                self.begun[i] = begin_shard(self.source, self.work.prompts, self.work.shards[i])
            except DataError:
                if i == shard:
                    raise
                break  # the shards before it come first
            self.waiting.popleft()
        return self.begun.pop(shard).entries()

    def keep(self) -> None:
        """Write the shards that are sampled completely, before the pool ends with an error."""
        for shard, begun in self.begun.items():
            if begun.ready():
                with suppress(PalateError):
                    entries = begun.entries()
                    write_shard(self.work.sampled(shard), entries, self.work.prompts, self.work.columns)


def _finished(work: Work, run: Run) -> Made:
    counts: dict[str, int] = {}
    total, scored = 0.0, 0
    for shard in range(len(work.shards)):
        entries = read_shard(work.path(shard))
        counts = added(counts, counts_of(entries))
        rewards = [r for entry in entries for r in entry.rewards or () if r is not None]
        total, scored = total + sum(rewards), scored + len(rewards)
    summary: dict[str, Any] = {
        "method": "pool",
        "steps": len(work.shards),
        **counts,
        **({"mean_reward": total / scored} if scored else {}),
        **{name.replace("/", "_"): value for name, value in run.meter().items() if name in COSTS},
        "seconds": round(run.seconds, 1),
    }
    return Made(run.directory, run.finish(summary))
