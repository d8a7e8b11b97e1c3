"""Numbers of a part of a run: its ends, its last quarter, its samples.

Where several steps learn from the same samples, numbers of samples count once for each set of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from palate.rundir import RunRecord, Sample

FEWEST_SAMPLES = 20
"""Samples below which no correlation is computed."""


def length_link(samples: Sequence[Sample]) -> float | None:
    """Spearman's correlation of the change in tokens and the change in reward, None if it has no value."""
    usable = [(s.tokens_after - s.tokens_before, s.gain) for s in samples if s.gain is not None]
    if len(usable) < FEWEST_SAMPLES:
        return None
    lengths, gains = (rankdata(values) for values in zip(*usable, strict=True))
    if np.ptp(lengths) == 0 or np.ptp(gains) == 0:
        return None
    return float(np.corrcoef(lengths, gains)[0, 1])


def ends(run: RunRecord, name: str) -> tuple[float, float] | None:
    """First and last value of a measurement that was taken at least twice."""
    values = run.curve(name)[1]
    return (values[0], values[-1]) if len(values) > 1 else None


def quarters(run: RunRecord, name: str) -> tuple[float, float] | None:
    """Means over the first and the last quarter of the steps."""
    values = run.curve(name)[1]
    size = _quarter(values)
    return (_mean(values[:size]), _mean(values[-size:])) if len(values) > 1 else None


def late(run: RunRecord, name: str) -> float | None:
    """Mean over the last quarter of the steps."""
    values = run.curve(name)[1]
    return _mean(values[-_quarter(values) :]) if values else None


def third_quarter(run: RunRecord, name: str) -> float | None:
    """Mean over the quarter before the last one; None with fewer than four steps."""
    values = run.curve(name)[1]
    size = _quarter(values)
    return _mean(values[-2 * size : -size]) if len(values) >= 4 else None


def rounds(run: RunRecord) -> int:
    """Rounds that a run has come to, each with a reference or with samples of its own; 1 without rounds."""
    return max(len(run.draws) if not run.fresh else 1, round(max(run.curve("round")[1], default=1)))


def latest_samples(run: RunRecord) -> str:
    """The part of a run that `late` takes numbers of samples from, in words."""
    if run.fresh:
        return "In the last quarter of the steps"
    drawn = run.draws
    if len(drawn) == 1:
        return "In the samples, which were drawn once"
    return f"In the last {'quarter ' if _quarter(drawn) > 1 else ''}of {len(drawn)} rounds"


def _quarter(values: Sequence[object]) -> int:
    return max(1, len(values) // 4)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
