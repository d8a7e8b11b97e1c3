"""Statistics of parts of a run: first and last values, quarters of the steps, samples.

If several steps learn from the same samples, a metric of samples has one value per draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from palate.rundir import RunRecord, Sample

FEWEST_SAMPLES = 20
"""Fewest samples for which a correlation is computed."""


def length_link(samples: Sequence[Sample]) -> float | None:
    """Return Spearman's correlation of the changes in tokens and in reward; None if it is undefined."""
    usable = [(s.tokens_after - s.tokens_before, s.gain) for s in samples if s.gain is not None]
    if len(usable) < FEWEST_SAMPLES:
        return None
    lengths, gains = (rankdata(values) for values in zip(*usable, strict=True))
    if np.ptp(lengths) == 0 or np.ptp(gains) == 0:
        return None
    return float(np.corrcoef(lengths, gains)[0, 1])


def ends(run: RunRecord, name: str) -> tuple[float, float] | None:
    """Return the first and last value of a metric; None with fewer than two values."""
    values = run.curve(name)[1]
    return (values[0], values[-1]) if len(values) > 1 else None


def quarters(run: RunRecord, name: str) -> tuple[float, float] | None:
    """Return the means over the first and the last quarter of the steps; None with fewer than two values."""
    values = run.curve(name)[1]
    size = _quarter(values)
    return (_mean(values[:size]), _mean(values[-size:])) if len(values) > 1 else None


def late(run: RunRecord, name: str) -> float | None:
    """Return the mean over the last quarter of the steps; None without values."""
    values = run.curve(name)[1]
    return _mean(values[-_quarter(values) :]) if values else None


def third_quarter(run: RunRecord, name: str) -> float | None:
    """Return the mean over the third quarter of the steps; None with fewer than four values."""
    values = run.curve(name)[1]
    size = _quarter(values)
    return _mean(values[-2 * size : -size]) if len(values) >= 4 else None


def rounds(run: RunRecord) -> int:
    """Return the number of rounds so far; a round has its own reference or samples. 1 without rounds."""
    return max(len(run.draws) if not run.fresh else 1, round(max(run.curve("round")[1], default=1)))


def latest_samples(run: RunRecord) -> str:
    """Return words for the part of a run that `late` covers for metrics of samples."""
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
