"""How far a reward model can be believed: its order of held-out pairs, and its probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.annotate import Annotator
from palate.statistics import rate_interval
from palate.types import Group, Pair

BINS = 10
"""Bins of confidence from 0.5 to 1."""

ENDS = ("low", "high")


@dataclass(frozen=True)
class RankingQuality:
    """How a reward model ranks pairs of which the better completion is known. Rates are in [0, 1].

    Intervals are those of `palate.statistics.rate_interval` with prompts as clusters, since several pairs of
    one prompt say less than pairs of several. A rate over no pairs is NaN, with the interval (0, 1).

    Attributes:
        pairs: how many were ranked.
        loss: mean of -log P(chosen preferred), in nats.
        margin: mean difference of reward.
        accuracy: share in which the chosen completion has the higher reward, a tie counting one half.
        accuracy_low, accuracy_high: its 95 % interval.
        ece: expected calibration error of P(chosen preferred), see `expected_calibration_error`.
        shorter_pairs: pairs in which the chosen completion is the shorter one, in tokens.
        accuracy_shorter: accuracy on these: what is left of it when length speaks for the other.
        accuracy_shorter_low, accuracy_shorter_high: its 95 % interval.
        longer_wins: the accuracy on all pairs of preferring whatever is longer in tokens, a tie counting one
            half: what a reward model has to beat.
        unusable: pairs left out because no usable reward was given.
    """

    pairs: int
    loss: float
    margin: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    ece: float
    shorter_pairs: int
    accuracy_shorter: float
    accuracy_shorter_low: float
    accuracy_shorter_high: float
    longer_wins: float
    unusable: int = 0

    def numbers(self) -> dict[str, float]:
        """All of them by name, without rates over no pairs."""
        none = (
            () if self.shorter_pairs else ("accuracy_shorter", *(f"accuracy_shorter_{end}" for end in ENDS))
        )
        return {name: value for name, value in vars(self).items() if name not in none}


def ranking_quality(pairs: Sequence[Pair], margins: Sequence[float], *, unusable: int = 0) -> RankingQuality:
    """What is to be known of a reward model from the margins it gives pairs.

    Args:
        pairs: held out.
        margins: reward of chosen minus reward of rejected, one per pair, in units in which their logistic is
            the probability that chosen is preferred: the difference of a reward model's scores (Bradley and
            Terry 1952), or the logit of a ranker's probability.
        unusable: how many more pairs there were without a margin.

    Raises:
        ValueError: not one finite margin per pair.
    """
    if len(margins) != len(pairs) or not all(math.isfinite(margin) for margin in margins):
        raise ValueError(
            f"{len(margins)} margins for {len(pairs)} pairs, or not all finite; expected one number each"
        )
    longer = [len(pair.chosen.token_ids) - len(pair.rejected.token_ids) for pair in pairs]
    rate, low, high = _rate(pairs, margins)
    shorter = [i for i, difference in enumerate(longer) if difference < 0]
    on_shorter = _rate([pairs[i] for i in shorter], [margins[i] for i in shorter])
    return RankingQuality(
        pairs=len(pairs),
        loss=_mean([max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))) for margin in margins]),
        margin=_mean(margins),
        accuracy=rate,
        accuracy_low=low,
        accuracy_high=high,
        ece=expected_calibration_error(margins),
        shorter_pairs=len(shorter),
        accuracy_shorter=on_shorter[0],
        accuracy_shorter_low=on_shorter[1],
        accuracy_shorter_high=on_shorter[2],
        longer_wins=_mean([_right(difference) for difference in longer]),
        unusable=unusable,
    )


def annotator_quality(annotate: Annotator, pairs: Sequence[Pair]) -> RankingQuality:
    """The same of whatever annotates: a reward model, a ranker, a rule. The pairs' tokens give the lengths.

    For a scorer whose rewards are in no such units, `ece` means nothing; the rest does. Pairs that get no
    usable reward are left out and counted.
    """
    groups = annotate([Group(pair.prompt, pair.completions) for pair in pairs])
    usable: list[tuple[Pair, float]] = []
    for pair, group in zip(pairs, groups, strict=True):
        assert group.rewards is not None
        chosen, rejected = group.rewards
        if chosen is not None and rejected is not None:
            usable.append((pair, chosen - rejected))
    kept, margins = [pair for pair, _ in usable], [margin for _, margin in usable]
    return ranking_quality(kept, margins, unusable=len(pairs) - len(kept))


def before_and_after(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """For `summary.json`: the first and the last row of such numbers, with the last's intervals.

    Args:
        measured: rows of `RankingQuality.numbers`, each name with `eval_` in front; others are passed over.
    """
    rows = [{name.removeprefix("eval_"): value for name, value in row.items()} for row in measured]
    rows = [row for row in rows if "ece" in row]
    if not rows:
        return {}
    first, last = rows[0], rows[-1]
    rates = [rate for rate in ("accuracy", "accuracy_shorter", "ece") if rate in last]
    return {
        "held_out_pairs": last["pairs"],
        **{f"{rate}_before": first[rate] for rate in rates},
        **{f"{rate}_after": last[rate] for rate in rates},
        **{f"{rate}_{end}": last[f"{rate}_{end}"] for rate in rates if rate != "ece" for end in ENDS},
        "shorter_pairs": last["shorter_pairs"],
        "longer_wins": last["longer_wins"],
    }


def expected_calibration_error(margins: Sequence[float], *, bins: int = BINS) -> float:
    """How far stated probabilities of a preference are from the shares in which it is so, on average.

    ECE = sum over bins of (n_bin / n) |share right in the bin - mean confidence in the bin|

    Guo et al. 2017, arXiv:1706.04599. A pair stated in the other order is stated with the complement, so both
    orders are counted: bins of P over [0, 1] then mirror each other about 1/2, and what is left is bins of
    the confidence max(P, 1 - P) over [1/2, 1]. P = 1/2 is right one half of the time.

    Args:
        margins: of pairs in which the first is truly preferred, with P(first preferred) = σ(margin).
        bins: of equal width over [1/2, 1], >= 1.

    Returns:
        In [0, 1]; NaN without margins.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    sums = [0.0] * bins
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        found = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        sums[found] += _right(margin) - confidence
    return sum(map(abs, sums)) / len(margins) if margins else math.nan


def _rate(pairs: Sequence[Pair], margins: Sequence[float]) -> tuple[float, float, float]:
    """Accuracy with its interval."""
    found = rate_interval([_right(margin) for margin in margins], [pair.prompt.id for pair in pairs])
    return found.rate, found.low, found.high


def _right(margin: float) -> float:
    """1 where chosen is ahead, 0.5 in a tie."""
    return 0.5 * ((margin > 0) + (margin >= 0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
