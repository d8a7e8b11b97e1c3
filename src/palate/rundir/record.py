"""Everything that a run's directory holds, as one frozen record."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.metrics import of_samples
from palate.rundir.config import read_description
from palate.rundir.files import (
    BIGGEST,
    METRICS,
    SAMPLES,
    STATUS,
    as_number,
    finite_number,
    read_lines,
)
from palate.rundir.metrics import read_summary
from palate.rundir.status import Status, read_status

Row = Mapping[str, float]
"""Metrics of one step by name; NaN where the run had no finite number."""

Points = tuple[tuple[float, ...], tuple[float, ...]]
"""Steps and values of a curve, of equal length."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with what the model wrote before and after the run. Lengths are in tokens."""

    prompt: str
    before: str
    after: str
    reward_before: float | None = None
    reward_after: float | None = None
    tokens_before: int = 0
    tokens_after: int = 0
    finish_before: str = ""
    finish_after: str = ""

    @property
    def gain(self) -> float | None:
        """By how much the reward has risen; None where either is missing."""
        if self.reward_before is None or self.reward_after is None:
            return None
        return self.reward_after - self.reward_before


@dataclass(frozen=True)
class RunRecord:
    """What the directory of a run holds.

    Attributes:
        directory: as it was given.
        method: name of the method.
        description: `config.json`, whole.
        status: how far it has come.
        rows: metrics of the steps, in order; the last writing of a step counts.
        measurements: held-out measurements, in order, step 0 before the first step.
        summary: `summary.json`, empty before the run has finished.
        samples: held-out prompts with completions before and after, none before the run has finished.
        unread: lines that are no row, by file.
    """

    directory: Path
    method: str
    description: Mapping[str, Any]
    status: Status
    rows: tuple[Row, ...] = ()
    measurements: tuple[Row, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    unread: Mapping[str, int] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration, flat."""
        config: Mapping[str, Any] = self.description["config"]
        return config

    @cached_property
    def draws(self) -> tuple[Row, ...]:
        """The first step of each set of samples: every step, or that with which a round begins."""
        drawn = [_draw(row) for row in self.rows]
        return tuple(
            row for i, row in enumerate(self.rows) if drawn[i] is None or i == 0 or drawn[i] != drawn[i - 1]
        )

    @property
    def fresh(self) -> bool:
        """Whether no step learns from samples that a step before it has learnt from."""
        return len(self.draws) == len(self.rows)

    def curve(self, name: str) -> Points:
        """Finite values of a metric with their steps; of numbers of samples, one for each set of them."""
        of_steps = self.draws if of_samples(name) else self.rows
        rows = sorted((*of_steps, *self.measurements), key=itemgetter("step"))
        found = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        return tuple(step for step, _ in found), tuple(value for _, value in found)

    def figure(self, name: str) -> float | None:
        """A number of the summary, None if it is missing or not finite."""
        return finite_number(self.summary, name)

    def setting(self, name: str) -> float | None:
        """A number of the configuration, None if it is missing or no number."""
        return finite_number(self.config, name)


def read_run(directory: Path) -> RunRecord:
    """Read a run, finished or not.

    Lines of `metrics.jsonl` and `samples.jsonl` that are no rows are left out and counted, except an
    unfinished last one: the run may be writing it.

    Raises:
        RunError: no run is there, or one of its files cannot be read.
    """
    description = read_description(directory)
    status = read_status(directory)
    if not 0 <= status.seconds <= BIGGEST:
        raise RunError(
            f"{str(directory / STATUS)!r} cannot be read: seconds is {status.seconds}, expected a time"
        )
    summary = read_summary(directory)
    logged, bad_metrics = read_lines(directory / METRICS, _row)
    # Without a summary, samples are those of an end that the run has gone on from.
    samples, bad_samples = ([], 0) if summary is None else read_lines(directory / SAMPLES, _sample)
    unread = {METRICS: bad_metrics, SAMPLES: bad_samples}
    return RunRecord(
        directory=directory,
        method=description["method"],
        description=description,
        status=status,
        rows=_by_step([row for row in logged if not _is_measurement(row)]),
        measurements=_by_step([row for row in logged if _is_measurement(row)]),
        summary=summary or {},
        samples=tuple(samples),
        unread={name: count for name, count in unread.items() if count},
    )


def read_runs(directories: Sequence[Path]) -> list[RunRecord]:
    """Read several runs.

    Raises:
        RunError: as `read_run`; none was given, or one twice.
    """
    if not directories:
        raise RunError("a report needs a run; give the directory of one, as runs/oaif")
    seen: dict[Path, Path] = {}
    for directory in directories:
        place = directory.resolve()
        if place in seen:
            raise RunError(
                f"the run {str(directory)!r} was given twice (first as {str(seen[place])!r}); give each once"
            )
        seen[place] = directory
    return [read_run(directory) for directory in directories]


def run_names(directories: Sequence[Path]) -> list[str]:
    """The shortest end of each path that tells it from the others: `a`, or `x/a` and `y/a`."""
    parts = [directory.resolve().parts for directory in directories]
    names = []
    for mine in parts:
        depth = 1
        while depth < len(mine) and sum(other[-depth:] == mine[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(mine[-depth:]))
    return names


# ---- Rows ------------------------------------------------------------------------------------------


def _row(found: dict[str, Any]) -> dict[str, float] | None:
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= BIGGEST:
        return None
    numbers = {k: as_number(v) for k, v in found.items() if v is None or isinstance(v, int | float)}
    return {**numbers, "step": float(step)}


def _is_measurement(row: Row) -> bool:
    """A step's row has the time it took; a measurement belongs to no step's work."""
    return not {"step_time", "loss"} & row.keys()


def _draw(row: Row) -> object:
    """What tells a step's samples from those of the next step; None where each step has its own.

    Methods in rounds count these. Those that draw candidates write the same numbers of them at every step,
    and two draws of the very same numbers would be no news.
    """
    if "round" in row:
        return row["round"]
    if "candidates/kept" in row:
        told = ("candidates/", "pairs/", "completions/", "objective/scores")
        return {k: v for k, v in row.items() if k.startswith(told) and math.isfinite(v)}
    return None


def _by_step(rows: Sequence[Row]) -> tuple[Row, ...]:
    """In order of steps, one row each. A run that was killed and goes on may write a step again."""
    found: dict[float, Row] = {}
    for row in rows:
        found[row["step"]] = {**found.get(row["step"], {}), **row}
    return tuple(found[step] for step in sorted(found))


def _sample(found: dict[str, Any]) -> Sample | None:
    texts = [found.get(name) for name in ("prompt", "before", "after")]
    if not all(isinstance(text, str) for text in texts):
        return None
    rewards = [as_number(found.get(name)) for name in ("reward_before", "reward_after")]
    tokens = [as_number(found.get(name)) for name in ("tokens_before", "tokens_after")]
    ends = [found.get(name) for name in ("finish_before", "finish_after")]
    prompt, before, after = map(str, texts)
    reward_before, reward_after = (reward if math.isfinite(reward) else None for reward in rewards)
    tokens_before, tokens_after = (int(count) if math.isfinite(count) else 0 for count in tokens)
    finish_before, finish_after = (end if isinstance(end, str) else "" for end in ends)
    return Sample(
        prompt,
        before,
        after,
        reward_before,
        reward_after,
        tokens_before,
        tokens_after,
        finish_before,
        finish_after,
    )
