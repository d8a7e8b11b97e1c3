"""The content of a run's directory as one frozen record."""

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
"""Metrics of one step by name; NaN if the run logged no finite number."""

Points = tuple[tuple[float, ...], tuple[float, ...]]
"""Steps and values of a curve, two tuples of equal length."""


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with the model's completions before and after training. Lengths are in tokens."""

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
        """The change in reward from before to after; None if either is missing."""
        if self.reward_before is None or self.reward_after is None:
            return None
        return self.reward_after - self.reward_before


@dataclass(frozen=True)
class RunRecord:
    """The content of a run's directory.

    Attributes:
        directory: the path as given.
        method: the method's name.
        description: the whole content of `config.json`.
        status: state and progress.
        rows: metrics of the steps, in order; if a step was logged twice, the later values count.
        measurements: held-out measurements, in order; step 0 is before training.
        summary: the content of `summary.json`; empty before the run has finished.
        samples: held-out prompts with completions before and after; empty before the run has finished.
        unread: the number of unreadable lines by file name.
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
        """The rows in which new samples were drawn: every step, or the first step of each round."""
        drawn = [_draw(row) for row in self.rows]
        return tuple(
            row for i, row in enumerate(self.rows) if drawn[i] is None or i == 0 or drawn[i] != drawn[i - 1]
        )

    @property
    def fresh(self) -> bool:
        """True if each step learns from new samples, so that no two steps share samples."""
        return len(self.draws) == len(self.rows)

    def curve(self, name: str) -> Points:
        """Return a metric's finite values with their steps; a metric of samples has one value per draw."""
        logged = self.draws if of_samples(name) else self.rows
        rows = sorted((*logged, *self.measurements), key=itemgetter("step"))
        points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        return tuple(step for step, _ in points), tuple(value for _, value in points)

    def figure(self, name: str) -> float | None:
        """Return a number of the summary; None if it is missing or not finite."""
        return finite_number(self.summary, name)

    def setting(self, name: str) -> float | None:
        """Return a number of the configuration; None if it is missing or not a number."""
        return finite_number(self.config, name)


def read_run(directory: Path) -> RunRecord:
    """Read a run, finished or not.

    Unreadable lines of `metrics.jsonl` and `samples.jsonl` are skipped and counted. An unfinished last line
    is not counted: the run may still be writing it.

    Raises:
        RunError: the directory is not a run, or one of its files cannot be read.
    """
    description = read_description(directory)
    status = read_status(directory)
    if not 0 <= status.seconds <= BIGGEST:
        raise RunError(
            f"{str(directory / STATUS)!r} cannot be read: seconds is {status.seconds}, expected a time"
        )
    summary = read_summary(directory)
    logged, bad_metrics = read_lines(directory / METRICS, _row)
    # Without a summary, `samples.jsonl` is left from before the run was resumed with more steps.
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
        RunError: as `read_run`; or no directory is given, or one is given twice.
    """
    if not directories:
        raise RunError("a report needs a run; give a run's directory, such as runs/oaif")
    seen: dict[Path, Path] = {}
    for directory in directories:
        place = directory.resolve()
        if place in seen:
            raise RunError(
                f"the run {str(directory)!r} is given twice (first as {str(seen[place])!r}); give each once"
            )
        seen[place] = directory
    return [read_run(directory) for directory in directories]


def run_names(directories: Sequence[Path]) -> list[str]:
    """Return the shortest distinct end of each path: `a`, or `x/a` and `y/a`."""
    parts = [directory.resolve().parts for directory in directories]
    names = []
    for mine in parts:
        depth = 1
        while depth < len(mine) and sum(other[-depth:] == mine[-depth:] for other in parts) > 1:
            depth += 1
        names.append("/".join(mine[-depth:]))
    return names


# ---- Rows ------------------------------------------------------------------------------------------


def _row(line: dict[str, Any]) -> dict[str, float] | None:
    step = line.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= BIGGEST:
        return None
    numbers = {k: as_number(v) for k, v in line.items() if v is None or isinstance(v, int | float)}
    return {**numbers, "step": float(step)}


def _is_measurement(row: Row) -> bool:
    """Return True for a held-out measurement: unlike a step's row, it has no step time and no loss."""
    return not {"step_time", "loss"} & row.keys()


def _draw(row: Row) -> object:
    """Return a value that is equal for steps that share samples; None if each step has new samples.

    Methods with rounds log the round. Methods that draw candidates once log the same numbers about them at
    every step; two draws with exactly equal numbers count as one.
    """
    if "round" in row:
        return row["round"]
    if "candidates/kept" in row:
        prefixes = ("candidates/", "pairs/", "completions/", "objective/scores")
        return {k: v for k, v in row.items() if k.startswith(prefixes) and math.isfinite(v)}
    return None


def _by_step(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Return one row per step, in order. A run that was killed and resumed may log a step twice."""
    merged: dict[float, Row] = {}
    for row in rows:
        merged[row["step"]] = {**merged.get(row["step"], {}), **row}
    return tuple(merged[step] for step in sorted(merged))


def _sample(line: dict[str, Any]) -> Sample | None:
    texts = [line.get(name) for name in ("prompt", "before", "after")]
    if not all(isinstance(text, str) for text in texts):
        return None
    rewards = [as_number(line.get(name)) for name in ("reward_before", "reward_after")]
    tokens = [as_number(line.get(name)) for name in ("tokens_before", "tokens_after")]
    ends = [line.get(name) for name in ("finish_before", "finish_after")]
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
