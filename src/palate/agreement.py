"""Agreement of an annotator with reference labels on pairs, and its biases of position and length.

Pure statistics of numbers; `palate evaluate judge` reads them from a labelled file. Rates are in [0, 1].
`palate.ranking` has the agreement of scores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from palate.calibration import expected_calibration_error
from palate.statistics import Rate, rate_interval
from palate.winrates import logistic, sandwich


class Judged(NamedTuple):
    """A judge's verdicts on a pair of texts, of which a reference prefers one.

    Attributes:
        first: P(preferred text wins) if it is shown first; None without a usable verdict.
        second: the same if it is shown second.
        cluster: the prompt.
        longer_by: length of the preferred text minus length of the other, in characters.
    """

    first: float | None
    second: float | None
    cluster: Hashable
    longer_by: int

    @property
    def p(self) -> float | None:
        """P(preferred text wins), the mean of both orders; None if one is missing."""
        return None if self.first is None or self.second is None else (self.first + self.second) / 2


@dataclass(frozen=True)
class PairAgreement:
    """Agreement of a judge with the reference on pairs. A pair counts if both orders have a verdict.

    Attributes:
        pairs: number of pairs that count; `unusable` is the number of the others.
        accuracy: share of pairs whose preferred text wins; a tie counts one half.
        ties: share of pairs with P = 1/2.
        consistency: share of pairs in which the same text wins in both orders; one half if an order is a tie.
        first_share: share of verdicts in which the text shown first wins; a tie counts one half.
        longer_share: share of pairs of unequal length in which the longer text wins; a tie counts one half.
        longer_reference: share of these pairs in which the reference prefers the longer text.
        length_coefficient: β of P(preferred wins) = logistic(α + β d), where d is `longer_by` in units of its
            root mean square. At 0, length does not sway the judge beyond quality. None without a finite
            estimate.
        length_standard_error: standard error of β, robust and clustered by prompt.
        kappa: Cohen's kappa with the reference (see `cohens_kappa`).
        ece: expected calibration error of P.
    """

    pairs: int
    unusable: int
    accuracy: Rate
    ties: float
    consistency: Rate
    first_share: Rate
    longer_share: Rate
    longer_reference: float
    length_coefficient: float | None
    length_standard_error: float | None
    kappa: float
    ece: float


def pair_agreement(verdicts: Sequence[Judged]) -> PairAgreement:
    """Return the agreement of a judge with the reference. Intervals allow for several pairs of a prompt."""
    usable = [(v, v.p) for v in verdicts if v.p is not None]
    wins = [_won(p) for _, p in usable]
    clusters = [v.cluster for v, _ in usable]
    orders = [(v.first, v.second) for v, _ in usable if v.first is not None and v.second is not None]
    unequal = [(v, p) for v, p in usable if v.longer_by]
    slope, error = length_effect(wins, [v.longer_by for v, _ in usable], clusters)
    return PairAgreement(
        pairs=len(usable),
        unusable=len(verdicts) - len(usable),
        accuracy=rate_interval(wins, clusters),
        ties=_mean([float(p == 0.5) for _, p in usable]),
        consistency=rate_interval([_same(first, second) for first, second in orders], clusters),
        first_share=rate_interval(
            [(_won(first) + 1 - _won(second)) / 2 for first, second in orders], clusters
        ),
        longer_share=rate_interval(
            [_won(p) if v.longer_by > 0 else 1 - _won(p) for v, p in unequal], [v.cluster for v, _ in unequal]
        ),
        longer_reference=_mean([float(v.longer_by > 0) for v, _ in unequal]),
        length_coefficient=slope,
        length_standard_error=error,
        kappa=cohens_kappa(wins),
        ece=expected_calibration_error([_logit(p) for _, p in usable]),
    )


def cohens_kappa(wins: Sequence[float]) -> float:
    """Return Cohen's kappa (Cohen 1960) of a judge with the reference: (p_o - p_e) / (1 - p_e).

    The classes are: first wins, second wins, tie (which the reference never says). Each pair counts in both
    orders, so that kappa does not depend on the order of the texts in the file. With the accuracy a and the
    share t of ties, p_o = a - t / 2 and p_e = (1 - t) / 2.

    Args:
        wins: 1 if the judge agrees with the reference, 0 if not, 0.5 for a tie.

    Returns:
        Kappa, at most 1, and 0 for a judge at chance; NaN without pairs.
    """
    if not wins:
        return math.nan
    ties = _mean([float(win == 0.5) for win in wins])
    observed, expected = _mean(wins) - ties / 2, (1 - ties) / 2
    return (observed - expected) / (1 - expected)


def length_effect(
    wins: Sequence[float], longer_by: Sequence[float], clusters: Sequence[Hashable]
) -> tuple[float | None, float | None]:
    """Return the coefficient of the length difference in a logistic regression, and its standard error.

    P(preferred wins) = logistic(α + β d), where α is the agreement at equal length. The standard error is the
    sandwich estimate with scores summed within clusters.

    Args:
        wins: 1 if the preferred text wins, 0 if not, 0.5 for a tie.
        longer_by: difference of length, in any one unit.
        clusters: the prompt of each pair.

    Returns:
        (None, None) if all differences are equal, or if a threshold of the difference separates wins from
        losses, because the estimate is infinite then.
    """
    import numpy as np

    lengths = np.asarray(longer_by, dtype=np.float64)
    if len(set(longer_by)) < 2 or _is_separated(wins, longer_by):
        return None, None
    design = np.column_stack([np.ones(len(lengths)), lengths / np.sqrt(np.mean(lengths**2))])
    target = np.asarray(wins, dtype=np.float64)
    coefficients = logistic(design, target, np.zeros(2))
    covariance = sandwich(design, target, np.zeros(2), coefficients, clusters)
    return float(coefficients[1]), math.sqrt(float(covariance[1, 1]))


def _is_separated(wins: Sequence[float], longer_by: Sequence[float]) -> bool:
    """Return True if a threshold separates wins from losses; a tie is both."""
    won = [d for win, d in zip(wins, longer_by, strict=True) if win > 0]
    lost = [d for win, d in zip(wins, longer_by, strict=True) if win < 1]
    return not won or not lost or max(lost) <= min(won) or max(won) <= min(lost)


def _won(p: float) -> float:
    return 0.5 * ((p > 0.5) + (p >= 0.5))


def _same(first: float, second: float) -> float:
    """Return 1 if both orders prefer the same text, 0 if not, 0.5 if one of them is a tie."""
    return 0.5 if 0.5 in (first, second) else float((first > 0.5) == (second > 0.5))


def _logit(p: float) -> float:
    return math.copysign(math.inf, p - 0.5) if p in (0.0, 1.0) else math.log(p / (1 - p))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
