"""Differences between methods that were trained with several seeds and measured on the same prompts.

A measurement is a table (S, P) of a method: a number for each of S seeds and P prompts. Seeds and prompts are
both random: another seed gives another model, and another sample of prompts gives other numbers. Interval and
test include both, so a difference that one lucky seed makes does not look certain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from palate.statistics import wilson

if TYPE_CHECKING:
    import numpy as np

PRIOR_SEEDS = 4.0
"""Weight of the seed variance of all methods, in degrees of freedom, against that of one method."""


class Pooled(NamedTuple):
    """The variance between the means of a method's seeds, over all methods, with its degrees of freedom."""

    variance: float
    freedom: int


NO_SEEDS = Pooled(0.0, 0)
"""No method has several seeds, so nothing is known of their variance."""


@dataclass(frozen=True)
class Difference:
    """The difference of the means of two methods.

    Attributes:
        one, other: the methods.
        mean: mean of `one` minus mean of `other`.
        low, high: 95 % interval, for this difference alone.
        p: two-sided p-value, for this difference alone.
        adjusted: p-value after Holm's correction for all differences.
        seeds: True if the variation between seeds is included: both, or any method, have several seeds.
    """

    one: str
    other: str
    mean: float
    low: float
    high: float
    p: float
    adjusted: float = math.nan
    seeds: bool = True

    @property
    def clear(self) -> bool:
        """True if the difference exceeds its uncertainty at 5 % over all differences together."""
        return self.adjusted < 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and degrees of freedom."""

    mean: float
    error: float
    freedom: float

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom)) * self.error if self.error else 0.0

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being zero; that of the sign test if all values are the same."""
        from scipy.stats import t

        if not self.error:
            return 1.0 if self.mean == 0 else min(1.0, 2.0**-self.freedom)
        return float(2 * t.sf(abs(self.mean) / self.error, self.freedom))


def differences(tables: Mapping[str, np.ndarray]) -> list[Difference]:
    """Return the differences of all pairs of methods, with Holm's correction.

    Args:
        tables: (S, P) for each method, NaN without a number. P is the same for all; S may differ.
    """
    import numpy as np

    pooled = pooled_variance(list(tables.values()))
    compared = []
    for (one, a), (other, b) in itertools.combinations(tables.items(), 2):
        usable = ~(np.isnan(a).any(0) | np.isnan(b).any(0))
        estimate = contrast([(1.0, a[:, usable]), (-1.0, b[:, usable])], pooled)
        low, high = estimate.mean - estimate.half, estimate.mean + estimate.half
        compared.append(
            Difference(one, other, estimate.mean, low, high, estimate.p, seeds=pooled.freedom > 0)
        )
    adjusted = holm([difference.p for difference in compared])
    return [
        Difference(**{**vars(difference), "adjusted": p})
        for difference, p in zip(compared, adjusted, strict=True)
    ]


def contrast(parts: Sequence[tuple[float, np.ndarray]], pooled: Pooled = NO_SEEDS) -> Estimate:
    """Return the weighted sum of the means of tables, with seeds and prompts as random effects.

    The variance is Vs + Vp - Vr: that of the seeds' means, that of the prompts' means, and the residual part
    that both contain. The variance between a method's seeds is estimated from few seeds, so it is combined
    with the pooled variance of all methods, which counts like at most `PRIOR_SEEDS` degrees of freedom (Smyth
    2004, with a fixed prior weight). The degrees of freedom are Satterthwaite's.

    Args:
        parts: weights and tables (S, P) without NaN, with the same P.
        pooled: the result of `pooled_variance`.
    """
    import numpy as np

    mean = math.fsum(weight * float(table.mean()) for weight, table in parts)
    prompts = parts[0][1].shape[1]
    by_prompt = sum(weight * table.mean(0) for weight, table in parts)
    assert not isinstance(by_prompt, int)
    if prompts < 2:
        return Estimate(mean, math.inf, 1.0)
    of_prompts = float(np.var(by_prompt, ddof=1)) / prompts
    if not pooled.freedom:
        return Estimate(mean, math.sqrt(of_prompts), prompts - 1)
    prior = min(PRIOR_SEEDS, pooled.freedom)
    of_seeds, residual = 0.0, 0.0
    for weight, table in parts:
        seeds = len(table)
        own = float(np.var(table.mean(1), ddof=1)) if seeds > 1 else 0.0
        combined = (prior * pooled.variance + (seeds - 1) * own) / (prior + seeds - 1)
        of_seeds += weight**2 * combined / seeds
        residual += weight**2 * _residual(table) / (seeds * prompts)
    variance = max(of_seeds + of_prompts - residual, of_seeds, of_prompts)
    freedom = prior + sum(len(table) - 1 for _, table in parts)
    terms = of_seeds**2 / freedom + of_prompts**2 / (prompts - 1)
    return Estimate(mean, math.sqrt(variance), variance**2 / terms if terms else prompts - 1)


def pooled_variance(tables: Sequence[np.ndarray]) -> Pooled:
    """Return the mean variance of the seeds' means over the methods."""
    import numpy as np

    several = [table for table in tables if len(table) > 1]
    freedom = sum(len(table) - 1 for table in several)
    if not freedom:
        return NO_SEEDS
    means = [np.nanmean(table, 1) for table in several]
    return Pooled(float(sum(np.var(m, ddof=1) * (len(m) - 1) for m in means) / freedom), freedom)


def rate_of(table: np.ndarray, pooled: Pooled = NO_SEEDS) -> tuple[float, float, float]:
    """Return a rate with its 95 % interval over seeds and prompts, Wilson's for the effective trials.

    Args:
        table: outcomes in [0, 1], (S, P); prompts with NaN are left out.
        pooled: as in `contrast`, of outcomes.
    """
    import numpy as np
    from scipy.special import ndtri
    from scipy.stats import t

    usable = table[:, ~np.isnan(table).any(0)]
    if not usable.size:
        return math.nan, 0.0, 1.0
    estimate = contrast([(1.0, usable)], pooled)
    spread = estimate.mean * (1 - estimate.mean)
    prompts = usable.shape[1]
    if not estimate.error or not spread or not math.isfinite(estimate.error):
        return estimate.mean, *wilson(estimate.mean, prompts)
    inflation = float(t.ppf(0.975, estimate.freedom) / ndtri(0.975))
    trials = min(spread / (estimate.error * inflation) ** 2, float(usable.size))
    return estimate.mean, *wilson(estimate.mean, trials)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values after the correction of Holm (1979), in the given order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def _residual(table: np.ndarray) -> float:
    """Return the variance that neither the seed nor the prompt explains; 0 for one seed."""
    seeds, prompts = table.shape
    if seeds < 2:
        return 0.0
    rest = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    return float((rest**2).sum()) / float((seeds - 1) * (prompts - 1))
