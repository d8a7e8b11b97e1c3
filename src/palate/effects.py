"""Differences between methods that were trained with several seeds and measured on the same prompts.

A measurement is a table (S, P) of a method: a number for each of S seeds and P prompts. Seeds and prompts are
both random: another seed gives another model, and another sample of prompts gives other numbers. Interval and
test include both, so a difference that one lucky seed makes does not look certain.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from palate.statistics import wilson

if TYPE_CHECKING:
    import numpy as np

PRIOR_SEEDS = 4.0
"""Most weight of the seed variance of other methods, in degrees of freedom, against that of one method."""


class Pooled(NamedTuple):
    """The variance between the means of a method's seeds, over several methods, and its freedom."""

    variance: float
    freedom: int


NO_SEEDS = Pooled(0.0, 0)
"""No method has several seeds, so nothing is known of their variance."""


class Part(NamedTuple):
    """A term of a contrast.

    Attributes:
        weight: factor of the table's mean.
        table: (S, P) without NaN.
        fixed: True for a model that no seed changes, such as the one before training.
    """

    weight: float
    table: np.ndarray
    fixed: bool = False


@dataclass(frozen=True)
class Difference:
    """The difference of the means of two methods.

    Attributes:
        one, other: the methods.
        mean: mean of `one` minus mean of `other`; NaN without a prompt that has a number of both.
        low, high: 95 % interval, for this difference alone.
        p: two-sided p-value, for this difference alone.
        adjusted: p-value after Holm's correction for all differences.
        seeds: True if the variation between seeds is included: some method has several.
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
    """A mean with its standard error and degrees of freedom; `seeds` if they include those of the seeds."""

    mean: float
    error: float
    freedom: float
    seeds: bool = False

    @property
    def half(self) -> float:
        """Half of the 95 % interval."""
        from scipy.stats import t

        return float(t.ppf(0.975, self.freedom)) * self.error if self.error else 0.0

    @property
    def p(self) -> float:
        """Two-sided p-value of the mean being zero; that of the sign test if all values are the same."""
        from scipy.stats import t

        if math.isnan(self.mean):
            return 1.0
        if not self.error:
            return 1.0 if self.mean == 0 else min(1.0, 2.0**-self.freedom)
        return float(2 * t.sf(abs(self.mean) / self.error, self.freedom))


def differences(tables: Mapping[str, np.ndarray], fixed: Collection[str] = ()) -> list[Difference]:
    """Return the differences of all pairs of methods, with Holm's correction.

    Args:
        tables: (S, P) for each method, NaN without a number. P is the same for all; S may differ.
        fixed: methods that no seed changes.
    """
    compared = []
    for (one, a), (other, b) in itertools.combinations(tables.items(), 2):
        pooled = pooled_variance([t for name, t in tables.items() if name not in (one, other, *fixed)])
        estimate = contrast(
            *_complete(Part(1.0, a, one in fixed), Part(-1.0, b, other in fixed)), pooled=pooled
        )
        low, high = estimate.mean - estimate.half, estimate.mean + estimate.half
        compared.append(Difference(one, other, estimate.mean, low, high, estimate.p, seeds=estimate.seeds))
    adjusted = holm([difference.p for difference in compared])
    return [
        Difference(**{**vars(difference), "adjusted": p})
        for difference, p in zip(compared, adjusted, strict=True)
    ]


def _complete(*parts: Part) -> list[Part]:
    """Return the parts with the prompts that have a number in all of them."""
    import numpy as np

    usable = ~np.any([np.isnan(part.table).any(0) for part in parts], axis=0)
    return [part._replace(table=part.table[:, usable]) for part in parts]


def contrast(*parts: Part, pooled: Pooled = NO_SEEDS) -> Estimate:
    """Return the weighted sum of the means of tables, with seeds and prompts as random effects.

    The variance is Vs + Vp - Vr: that of the seeds' means, that of the prompts' means, and the residual part
    that both contain. The variance between a method's seeds is estimated from few seeds, so it is combined
    with that of the other methods, which counts like at most `PRIOR_SEEDS` degrees of freedom (Smyth 2004,
    with a fixed prior weight). The degrees of freedom are Satterthwaite's, with each variance counted once.

    Args:
        parts: the terms, with the same P.
        pooled: the result of `pooled_variance` for the methods that are no part of this contrast.
    """
    import numpy as np

    prompts = parts[0].table.shape[1]
    if not prompts:
        return Estimate(math.nan, math.inf, 1.0)
    mean = math.fsum(part.weight * float(part.table.mean()) for part in parts)
    if prompts < 2:
        return Estimate(mean, math.inf, 1.0)
    by_prompt = np.sum([part.weight * part.table.mean(0) for part in parts], axis=0)
    of_prompts = float(np.var(by_prompt, ddof=1)) / prompts
    known = _between_seeds([part for part in parts if not part.fixed], pooled)
    of_seeds = math.fsum(variance for variance, _ in known)
    residual = sum(part.weight**2 * _residual(part.table) / (len(part.table) * prompts) for part in parts)
    variance = max(of_seeds + of_prompts - residual, of_seeds, of_prompts)
    terms = sum(part**2 / freedom for part, freedom in (*known, (of_prompts, prompts - 1)))
    freedom = variance**2 / terms if terms else prompts - 1
    return Estimate(mean, math.sqrt(variance), freedom, seeds=bool(known))


def _between_seeds(parts: Sequence[Part], pooled: Pooled) -> list[tuple[float, float]]:
    """Return the variance of a contrast between seeds as independent summands with their degrees of freedom.

    A method with one seed takes the variance of the others, or of the other parts; without any there is none.
    """
    import numpy as np

    seeds = [len(part.table) for part in parts]
    factors = [part.weight**2 / len(part.table) for part in parts]
    prior, all_own = min(PRIOR_SEEDS, pooled.freedom), sum(seeds) - len(seeds)
    of_others, of_own = 0.0, [0.0] * len(parts)
    for i, factor in enumerate(factors):
        if freedom := prior + seeds[i] - 1:
            of_others += factor * prior / freedom
            of_own[i] += factor * (seeds[i] - 1) / freedom
        elif all_own:
            of_own = [own + factor * (count - 1) / all_own for own, count in zip(of_own, seeds, strict=True)]
    summands = [(of_others * pooled.variance, prior)] if prior else []
    for share, part, count in zip(of_own, parts, seeds, strict=True):
        if count > 1:
            summands.append((share * float(np.var(part.table.mean(1), ddof=1)), count - 1))
    return summands


def pooled_variance(tables: Sequence[np.ndarray]) -> Pooled:
    """Return the mean variance of the seeds' means over the methods; seeds without a number are left out."""
    import numpy as np

    usable = [table[~np.isnan(table).all(1)] for table in tables]
    means = [np.nanmean(table, 1) for table in usable if len(table) > 1]
    freedom = sum(len(of_seeds) - 1 for of_seeds in means)
    if not freedom:
        return NO_SEEDS
    squares = sum(np.var(of_seeds, ddof=1) * (len(of_seeds) - 1) for of_seeds in means)
    return Pooled(float(squares / freedom), freedom)


def rate_of(table: np.ndarray, pooled: Pooled = NO_SEEDS) -> tuple[float, float, float]:
    """Return a rate with its 95 % interval over seeds and prompts, Wilson's for the effective trials.

    Args:
        table: outcomes in [0, 1], (S, P); prompts with NaN are left out.
        pooled: as in `contrast`, of the outcomes of other methods.
    """
    import numpy as np
    from scipy.special import ndtri
    from scipy.stats import t

    usable = table[:, ~np.isnan(table).any(0)]
    if not usable.size:
        return math.nan, 0.0, 1.0
    estimate = contrast(Part(1.0, usable), pooled=pooled)
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
