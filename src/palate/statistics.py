"""The 95 % intervals of every rate that Palate prints: win rates, accuracies, agreement."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

PRIOR = 0.65
"""Number of clusters with the largest possible variance that `rate_interval` adds to its estimate."""


class Rate(NamedTuple):
    """A rate with its interval, all in [0, 1].

    Attributes:
        rate: mean outcome; NaN without outcomes.
        low, high: the interval; (0, 1) without outcomes.
        trials: effective number of independent coin flips that would give an interval of the same width.
    """

    rate: float
    low: float
    high: float
    trials: float


def rate_interval(
    outcomes: Sequence[float], clusters: Sequence[Hashable] | None = None, *, confidence: float = 0.95
) -> Rate:
    """Return the mean of outcomes in [0, 1] with an interval that allows for correlation within clusters.

    Several pairs of one prompt carry less information than pairs of several prompts, by an unknown amount.
    Two numbers estimate how many independent coin flips the outcomes are worth: Kish's effective number of
    clusters, 1 / Σ w² for clusters with the shares w of the outcomes (Kish 1965), which counts every cluster
    as one coin; and the variance of the clusters' mean outcomes as a share of a coin's, p (1 - p), which is
    below 1 where a cluster has several outcomes that differ, or ties. That share is estimated twice, from the
    distance of the clusters' means from p (with residuals scaled up as in HC2) and from the variation within
    clusters; the larger estimate is used, with `PRIOR` clusters of the share 1 added, so that five ties do
    not give certainty. Wilson's interval (Wilson 1927) for the effective number of trials follows.

    docs/statistics.md has the simulated coverage, made by `experiments/coverage.py`.

    Args:
        outcomes: one for each comparison: 1 won, 0 lost, 0.5 a tie; or means of several.
        clusters: the prompt, or another key, of each outcome; by default, each is its own cluster.
        confidence: the confidence level of the interval.

    Raises:
        ValueError: an outcome lies outside [0, 1], or not every outcome has its cluster.
    """
    import numpy as np  # the configuration of reward models imports this file and must load fast

    values = np.asarray(outcomes, dtype=np.float64)
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError("an outcome lies outside [0, 1]; expected 1 for won, 0 for lost, 0.5 for a tie")
    keys = range(len(values)) if clusters is None else clusters
    if len(keys) != len(values):
        raise ValueError(f"{len(values)} outcomes have {len(keys)} clusters; expected one cluster for each")
    if not len(values):
        return Rate(math.nan, 0.0, 1.0, 0.0)
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    index = np.array([number[key] for key in keys])
    sizes = np.bincount(index)
    means = np.bincount(index, values) / sizes
    rate = float(values.mean())
    trials = _effective_trials(rate, means, sizes / len(values))
    return Rate(rate, *wilson(rate, trials, confidence=confidence), trials)


def wilson(rate: float, trials: float, *, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's score interval for a rate (Wilson 1927): (0, 1) without trials.

    Args:
        rate: mean outcome of a trial, in [0, 1].
        trials: number of independent trials, or the effective number from `rate_interval`.
        confidence: the confidence level of the interval.
    """
    if trials == 0:
        return 0.0, 1.0
    from scipy.special import ndtri

    z = float(ndtri(0.5 + confidence / 2))
    centre = (rate + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    # The rate lies within its interval; rounding can put an end of 5e-17 above a rate of 0.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


def _effective_trials(rate: float, means: np.ndarray, shares: np.ndarray) -> float:
    """Return the number of coin flips that clusters with these means and shares, (K,) both, are worth."""
    kish = 1.0 / float((shares * shares).sum())
    spread = rate * (1 - rate)
    if (
        spread < 1e-12 or len(means) == 1
    ):  # all won or all lost, or one cluster: the variance cannot be estimated
        return kish
    away = (shares * (means - rate)) ** 2 / (1 - shares)
    between = kish * float(away.sum()) / spread
    # E[y (1 - y)] = p (1 - p) - Var(y), for the mean y of a cluster. This is exact for clusters without
    # variation, which are coin flips. The denominator corrects p (1 - p), which is too small for an estimated
    # p.
    variety = kish * float((shares * shares * means * (1 - means)).sum()) / spread
    within = (1 - variety) / (1 - variety / kish) if variety < 1 else 0.0
    share = min(1.0, max(between, within))
    return kish * (kish + PRIOR) / (kish * share + PRIOR)
