"""A run's directory as one frozen record."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

from palate.errors import RunError
from palate.run.status import Status, read_status

T = TypeVar("T")

BIGGEST = 1e30
"""Numbers beyond are taken for infinite: nothing that is measured here comes near."""

OF_SAMPLES = (
    "completions/mean_", "completions/min_", "completions/max_", "completions/clipped_", "pairs/", "pool/",
    "candidates/", "objective/scores", "objective/unusable", "val/", "frac_reward_zero_std", "logps/fresh",
    "sampling/sampling_logp_difference/",
)  # fmt: skip
"""What the names of numbers of freshly sampled completions begin with."""

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
        found = self.description.get("config")
        return found if isinstance(found, dict) else {}

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
        of_steps = self.draws if name.startswith(OF_SAMPLES) else self.rows
        rows = sorted((*of_steps, *self.measurements), key=itemgetter("step"))
        found = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
        return tuple(step for step, _ in found), tuple(value for _, value in found)

    def figure(self, name: str) -> float | None:
        """A number of the summary, None if it is missing or not finite."""
        value = _number(self.summary.get(name))
        return value if math.isfinite(value) else None

    def setting(self, name: str) -> float | None:
        """A number of the configuration, None if it is missing or no number."""
        value = _number(self.config.get(name))
        return value if math.isfinite(value) else None


def read_run(directory: Path) -> RunRecord:
    """Read a run, finished or not.

    Lines of `metrics.jsonl` and `samples.jsonl` that are no rows are left out and counted, except an
    unfinished last one: the run may be writing it.

    Raises:
        RunError: no run is there, or one of its files cannot be read.
    """
    description = _document(directory / "config.json")
    if description is None or not isinstance(description.get("method"), str):
        raise RunError(
            f"{str(directory)!r} holds no run: a run has a config.json that names its method; give the "
            "directory that the run was given as --output"
        )
    status = read_status(directory)
    if not 0 <= status.seconds <= BIGGEST:
        raise RunError(
            f"{str(directory / 'status.json')!r} cannot be read: seconds is {status.seconds}, expected a time"
        )
    summary = _document(directory / "summary.json")
    logged, bad_metrics = _lines(directory / "metrics.jsonl", _row)
    # Without a summary, samples are those of an end that the run has gone on from.
    samples, bad_samples = ([], 0) if summary is None else _lines(directory / "samples.jsonl", _sample)
    unread = {"metrics.jsonl": bad_metrics, "samples.jsonl": bad_samples}
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


# ---- Files -----------------------------------------------------------------------------------------


def _bytes(path: Path) -> bytes | None:
    """What a file holds; None where there is no file."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None


def _document(path: Path) -> dict[str, Any] | None:
    text = _bytes(path)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RunError(f"{str(path)!r} cannot be read: it is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise RunError(f"{str(path)!r} cannot be read: it holds no JSON object")
    return found


def _lines(path: Path, parse: Callable[[dict[str, Any]], T | None]) -> tuple[list[T], int]:
    """What can be parsed, and a count of what cannot."""
    lines = (_bytes(path) or b"").split(b"\n")
    unfinished = lines.pop()  # empty after a last line that is whole; else it may be cut within a letter
    rows = [_parsed(line, parse) for line in lines if line.strip()]
    whole = [row for row in rows if row is not None]
    last = _parsed(unfinished, parse)
    return whole + ([] if last is None else [last]), len(rows) - len(whole)


def _parsed(line: bytes, parse: Callable[[dict[str, Any]], T | None]) -> T | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return parse(found) if isinstance(found, dict) else None


# ---- Rows ------------------------------------------------------------------------------------------


def _number(value: object) -> float:
    """A float; NaN for what is no number or too large for one to be meant."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= BIGGEST:
        return math.nan
    return float(value)


def _row(found: dict[str, Any]) -> dict[str, float] | None:
    step = found.get("step")
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= BIGGEST:
        return None
    numbers = {k: _number(v) for k, v in found.items() if v is None or isinstance(v, int | float)}
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
    rewards = [_number(found.get(name)) for name in ("reward_before", "reward_after")]
    tokens = [_number(found.get(name)) for name in ("tokens_before", "tokens_after")]
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
