"""Win rates from verdicts: plain, discrete and length-controlled.

A verdict is P(model preferred) over a baseline, with the lengths of both texts. Rates are in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

QUALITY_PRIOR, LENGTH_PRIOR = 0.0025, 0.017
"""Strengths of the two penalties of `length_controlled`, per verdict.

Weaker penalties extrapolate too far for models whose texts are nearly all shorter than the baseline's, and
differ more from AlpacaEval's published numbers; stronger ones leave more of the effect of length."""


PRIOR = 0.65
"""Number of verdicts with the variance of a coin flip that the binomial standard error adds, as
`palate.statistics.PRIOR` does for clusters."""


class Verdict(NamedTuple):
    """A comparison of a model's text with a baseline's text.

    Attributes:
        preference: P(model preferred) in [0, 1]; 0.5 is a tie.
        length, baseline_length: lengths of the two texts, in any one unit.
    """

    preference: float
    length: float
    baseline_length: float


@dataclass(frozen=True)
class Controlled:
    """A length-controlled win rate.

    Attributes:
        rate: the win rate that the model would have at the baseline's lengths.
        standard_error: its standard error.
        low, high: its 95 % interval.
        length_effect: coefficient of the length; positive if longer texts are preferred.
    """

    rate: float
    standard_error: float
    low: float
    high: float
    length_effect: float


def win_rate(preferences: Sequence[float]) -> float:
    """Return the mean preference; NaN without verdicts."""
    return math.fsum(preferences) / len(preferences) if preferences else math.nan


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of independent values; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def discrete_win_rate(preferences: Sequence[float]) -> float:
    """Return the share of verdicts that prefer the model; a tie counts half. NaN without verdicts."""
    return win_rate([0.5 * ((p > 0.5) + (p >= 0.5)) for p in preferences])


def length_controlled(verdicts: Sequence[Verdict], clusters: Sequence[Hashable] | None = None) -> Controlled:
    """Return the win rate with the effect of length removed (Dubois et al. 2024, arXiv:2404.04475).

    Fit P(model preferred) = logistic(θ + φ tanh(Δ / sd(Δ))), where Δ is the model's length minus the
    baseline's, and return logistic(θ), the prediction at Δ = 0. The paper's term for the difficulty of an
    instruction is left out, since it needs verdicts about many models.

    Both coefficients have a light L2 penalty, ½ n (QUALITY_PRIOR θ² + LENGTH_PRIOR φ²) for n verdicts. If all
    texts are longer than the baseline's by about the same amount, the data cannot separate length from
    quality: then the penalty keeps φ near zero, and the standard error is large. The standard error is the
    larger of two: the sandwich estimate, which allows for verdicts that are probabilities, and the binomial
    one less the part within verdicts, p (1 - p) - y (1 - y), with `PRIOR` verdicts of the full variance. The
    former vanishes if one side always wins, since the fit then follows the verdicts.

    Args:
        verdicts: at least one.
        clusters: the prompt of each verdict; those of one prompt may depend on each other.
    """
    import numpy as np

    table = np.asarray(verdicts, dtype=np.float64)
    preference, difference = table[:, 0], table[:, 1] - table[:, 2]
    spread = float(difference.std())
    # Equal differences carry no information about length: the coefficient stays at zero.
    scaled = np.tanh(difference / spread) if spread > 1e-9 else np.zeros(len(table))
    design = np.column_stack([np.ones(len(table)), scaled])
    penalty = len(table) * np.array([QUALITY_PRIOR, LENGTH_PRIOR])
    coefficients = logistic(design, preference, penalty)
    fit = design, preference, penalty, coefficients
    error = math.sqrt(max(sandwich(*fit, clusters)[0, 0], _binomial(*fit)[0, 0]))
    centre = float(coefficients[0])
    rate = _sigmoid(centre)
    low, high = _sigmoid(centre - 1.96 * error), _sigmoid(centre + 1.96 * error)
    return Controlled(rate, rate * (1 - rate) * error, low, high, float(coefficients[1]))


def logistic(design: np.ndarray, target: np.ndarray, penalty: np.ndarray) -> np.ndarray:
    """Return the coefficients (K,) of a logistic regression with L2 penalties, by Newton's method."""
    import numpy as np

    coefficients = np.zeros(design.shape[1])
    for _ in range(100):
        mean = 1 / (1 + np.exp(-design @ coefficients))
        gradient = design.T @ (target - mean) - penalty * coefficients
        curvature = (design * (mean * (1 - mean))[:, None]).T @ design + np.diag(penalty)
        step = np.linalg.solve(curvature, gradient)
        # The penalty bounds the optimum; a shorter step keeps Newton's method from overshooting it.
        coefficients = coefficients + step * min(1.0, 2.0 / float(np.abs(step).max() + 1e-300))
        if float(np.abs(step).max()) < 1e-12:
            break
    return coefficients


def sandwich(
    design: np.ndarray,
    target: np.ndarray,
    penalty: np.ndarray,
    coefficients: np.ndarray,
    clusters: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Return the robust covariance (K, K) of the coefficients.

    Rows of the same cluster may depend on each other; without clusters, all rows are independent.
    """
    import numpy as np

    mean = 1 / (1 + np.exp(-design @ coefficients))
    bread = np.linalg.inv((design * (mean * (1 - mean))[:, None]).T @ design + np.diag(penalty))
    scores = design * (target - mean)[:, None]
    if clusters is not None:
        number = {key: i for i, key in enumerate(dict.fromkeys(clusters))}
        sums = np.zeros((len(number), scores.shape[1]))
        np.add.at(sums, [number[key] for key in clusters], scores)
        scores = sums
    covariance: np.ndarray = bread @ (scores.T @ scores) @ bread
    return covariance


def _binomial(
    design: np.ndarray, target: np.ndarray, penalty: np.ndarray, coefficients: np.ndarray
) -> np.ndarray:
    """Return the covariance (K, K) of the coefficients for targets y with the variance p (1 - p) - y (1 - y).

    A target of 0 or 1 has the whole variance of a coin flip, and a tie at p = 1/2 has none. `PRIOR` rows of
    the whole variance are added, so that a few ties do not give certainty.
    """
    import numpy as np

    mean = 1 / (1 + np.exp(-design @ coefficients))
    coin = mean * (1 - mean)
    n = len(target)
    variance = (n * (coin - target * (1 - target)) + PRIOR * coin) / (n + PRIOR)
    bread = np.linalg.inv((design * coin[:, None]).T @ design + np.diag(penalty))
    covariance: np.ndarray = bread @ ((design * variance[:, None]).T @ design) @ bread
    return covariance


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
