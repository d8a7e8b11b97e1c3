"""Measure the finished runs of a comparison on the same prompts, in a run that stores what it measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from palate.annotate import Annotator
from palate.annotate import annotator as annotator_for
from palate.comparison.config import CompareConfig
from palate.comparison.runs import Job
from palate.comparison.shared import asking
from palate.evaluation.config import EvaluateConfig
from palate.evaluation.sides import Side, log_likelihoods, opened, sampled
from palate.journal import Journal
from palate.launch.rewards import annotator_of
from palate.pool.pool import BILL
from palate.run import Display, Run
from palate.run.judging import model_options
from palate.run.seeds import seed_of
from palate.rundir import read_status, read_summary
from palate.rundir.checkpoints import checkpoints_in
from palate.types import Group, Prompt

FRONTIER_PROMPTS = 32
"""Test prompts on which checkpoints before the last are measured."""


@dataclass(frozen=True)
class Point:
    """A checkpoint on the frontier: mean reward and KL in nats per completion, and its step."""

    arm: str
    seed: int
    step: int
    reward: float
    kl: float
    result: bool


@dataclass(frozen=True)
class Measured:
    """One run, measured on the test prompts.

    Attributes:
        side: its completions.
        rewards: the reward of each prompt's completion; a judge's is P(preferred to the base's). (P,)
        base: the same of the base's completions. (P,)
        gold, gold_base: the same by the hidden annotator; None without one.
        log_ratios: log policy - log base of completions sampled at temperature 1, whose mean is the KL. (P,)
        points: its checkpoints, the last one included.
        base_lengths: characters of the base's completions. (P,)
    """

    job: Job
    side: Side
    rewards: np.ndarray
    base: np.ndarray
    gold: np.ndarray | None
    gold_base: np.ndarray | None
    log_ratios: np.ndarray
    points: tuple[Point, ...]
    base_lengths: tuple[int, ...]


@dataclass(frozen=True)
class Meter:
    """The open measurement: its run, annotators and options, and the base's side."""

    run: Run
    annotate: Annotator
    gold: Annotator | None
    options: EvaluateConfig
    model: str
    base: Side
    prompts: Sequence[Prompt]


@contextmanager
def measuring(
    cfg: CompareConfig, model: str, prompts: Sequence[Prompt], display: Display, place: str = "measurements"
) -> Iterator[Meter]:
    """Open the measurement and sample the base model."""
    options = asking(cfg, model, place)
    with Run(options, method="compare", display=display) as run:
        run.journal.forget_unusable()  # a server that failed may work again
        annotate = annotator_of(options.annotating, run, None)  # type: ignore[arg-type]
        assert annotate is not None, "the configuration requires a reward or a judge"
        gold = None
        if cfg.gold:
            gold = run.annotator(annotator_for(cfg.gold, **model_options(options)), name="gold")
        with opened(model, options, run) as one:
            base = sampled(one, model, prompts, options, place=0, own=True)
        yield Meter(run, annotate, gold, options, model, base, prompts)
        run.finish({"measured": "see ../summary.json"})


def measure(meter: Meter, jobs: Sequence[Job], *, points: int) -> list[Measured]:
    """Return the measurements of the runs, in order. One model is in memory at a time."""
    sides: list[tuple[Job, Side, list[tuple[int, Side]]]] = []
    for job in jobs:
        result = job.directory / str((read_summary(job.directory) or {})["checkpoint"])
        meter.run.display.say(f"{job.name}: measuring")
        place = seed_of(0, job.name)
        with opened(str(result), meter.options, meter.run) as one:
            side = sampled(one, job.name, meter.prompts, meter.options, place=place, own=True)
        earlier = []
        for step, path in _earlier(job, result, points):
            with opened(str(path), meter.options, meter.run) as one:
                few = meter.prompts[:FRONTIER_PROMPTS]
                earlier.append((step, sampled(one, job.name, few, meter.options, place=place, own=True)))
        sides.append((job, side, earlier))
    return list(_numbers(meter, sides))


def _earlier(job: Job, result: Path, points: int) -> list[tuple[int, Path]]:
    """Return evenly spaced checkpoints before the run's result."""
    others = [(step, path) for step, path in checkpoints_in(job.directory).items() if path != result and step]
    if points <= 1 or not others:
        return []
    wanted = np.linspace(0, len(others) - 1, min(points - 1, len(others))).round().astype(int)
    return [others[i] for i in sorted(set(wanted.tolist()))]


def _numbers(meter: Meter, sides: Sequence[tuple[Job, Side, list[tuple[int, Side]]]]) -> Iterator[Measured]:
    with opened(meter.model, meter.options, meter.run) as one:
        for job, side, earlier in sides:
            old, new = _scores(meter.annotate, meter.base, side)
            gold_old, gold_new = (None, None) if meter.gold is None else _scores(meter.gold, meter.base, side)
            ratios = np.subtract(side.own_logps, log_likelihoods(one, side.own))
            result = str((read_summary(job.directory) or {})["checkpoint"])
            step = int(result.rpartition("-")[2])
            points = [Point(job.arm, job.seed, step, float(np.nanmean(new)), float(ratios.mean()), True)]
            for step, part in earlier:
                _, own = _scores(meter.annotate, meter.base, part)
                kl = float(np.subtract(part.own_logps, log_likelihoods(one, part.own)).mean())
                points.append(Point(job.arm, job.seed, step, float(np.nanmean(own)), kl, False))
            lengths = tuple(len(group.completions[0].text) for group in meter.base.groups)
            yield Measured(job, side, new, old, gold_new, gold_old, ratios, tuple(points), lengths)


def _scores(annotate: Annotator, base: Side, side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Return the rewards of the base's and the side's first completions of each prompt, (P,) both."""
    pairs = [
        Group(new.prompt, (old.completions[0], new.completions[0]))
        for old, new in zip(base.groups, side.groups, strict=False)
    ]
    table = np.array([group.rewards for group in annotate(pairs)], dtype=np.float64)
    return table[:, 0], table[:, 1]


def outcomes(meter: Meter, one: Measured, other: Measured) -> np.ndarray:
    """Return 1 for each prompt on which `one` wins against `other`, 0.5 for a tie, NaN without a verdict."""
    mine, theirs = one.rewards, other.rewards
    if meter.options.pairwise:
        theirs, mine = _scores(meter.annotate, other.side, one.side)
    won = 0.5 * ((mine > theirs).astype(float) + (mine >= theirs))
    return np.where(np.isnan(mine) | np.isnan(theirs), np.nan, won)


def spending(job: Job) -> dict[str, float]:
    """Return what a run itself sampled, asked and paid, and its part of a pool that it read."""
    journal = Journal(job.directory / "journal.db")
    try:
        rows = [row for row in journal.table() if not row["place"].startswith("measured ")]
    finally:
        journal.close()
    summary: Mapping[str, Any] = read_summary(job.directory) or {}
    questions = float(summary.get("judge_verdicts") or sum(row["reward"] is not None for row in rows))
    pool = {name: float(summary.get(f"pool_{name}") or 0.0) for name in BILL}
    return {
        "completions": len(rows) + pool["completions"],
        "tokens": sum(row["tokens"] for row in rows) + pool["tokens"],
        "verdicts": questions + pool["verdicts"],
        "cost": float(summary.get("judge_cost") or 0.0) + pool["cost"],
        "seconds": float(summary.get("seconds") or 0.0) + pool["seconds"],
        "steps": float(summary.get("updates") or read_status(job.directory).step),
    }
