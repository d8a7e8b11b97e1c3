"""The quality of a reward model: its ranking of held-out pairs, and the calibration of its probabilities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.annotate import Annotator
from palate.statistics import rate_interval
from palate.types import Group, Pair

BINS = 10
"""Number of bins of confidence from 0.5 to 1."""

ENDS = ("low", "high")


@dataclass(frozen=True)
class RankingQuality:
    """The quality of a reward model's ranking of preference pairs. Rates are in [0, 1].

    Intervals are those of `palate.statistics.rate_interval` with prompts as clusters, since several pairs of
    one prompt are less informative than pairs of several prompts. A rate over no pairs is NaN, with the
    interval (0, 1).

    Attributes:
        pairs: number of ranked pairs.
        loss: mean of -log P(chosen preferred), in nats.
        margin: mean difference of reward.
        accuracy: fraction of pairs whose chosen completion has the higher reward; a tie counts one half.
        accuracy_low, accuracy_high: 95 % interval of the accuracy.
        ece: expected calibration error of P(chosen preferred), see `expected_calibration_error`.
        shorter_pairs: number of pairs whose chosen completion is shorter, in tokens.
        accuracy_shorter: accuracy on these pairs, in which a preference for length is wrong.
        accuracy_shorter_low, accuracy_shorter_high: 95 % interval of this accuracy.
        longer_wins: accuracy of always preferring the longer completion in tokens, with one half for ties:
            the baseline for a reward model.
        unusable: number of pairs without a usable reward, which are not ranked.
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
        """Return all attributes by name, without rates over no pairs."""
        none = (
            () if self.shorter_pairs else ("accuracy_shorter", *(f"accuracy_shorter_{end}" for end in ENDS))
        )
        return {name: value for name, value in vars(self).items() if name not in none}


def ranking_quality(pairs: Sequence[Pair], margins: Sequence[float], *, unusable: int = 0) -> RankingQuality:
    """Return the quality of a reward model, from its margins on pairs.

    Args:
        pairs: held-out pairs.
        margins: reward of chosen minus reward of rejected, one per pair, in log-odds, so that their logistic
            is P(chosen preferred): the difference of a reward model's scores (Bradley and Terry 1952), or the
            logit of a ranker's probability.
        unusable: number of further pairs without a margin.

    Raises:
        ValueError: the number of margins differs from the number of pairs, or a margin is not finite.
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
    """Return the quality of any annotator: a reward model, a ranker or a rule.

    For a scorer whose rewards are not in log-odds, ignore `loss` and `ece`. Pairs without a usable reward are
    not ranked but counted.
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
    """Return the rates of the first and the last measurement for `summary.json`, with the last intervals.

    Args:
        measured: rows of `RankingQuality.numbers` with the prefix `eval_`; other rows are ignored.
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
    """Return the mean difference between predicted preference probabilities and observed frequencies.

    ECE = sum over bins of (n_bin / n) |fraction correct in the bin - mean confidence in the bin|

    Guo et al. 2017, arXiv:1706.04599. A pair in the reverse order has the complementary probability. Counting
    both orders makes bins of P over [0, 1] symmetric about 1/2, so bins of the confidence max(P, 1 - P) over
    [1/2, 1] suffice. P = 1/2 counts as correct one half of the time.

    Args:
        margins: margins of pairs whose first completion is preferred, with P(first preferred) = σ(margin).
        bins: number of bins of equal width over [1/2, 1], >= 1.

    Returns:
        The error in [0, 1]; NaN without margins.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}, expected at least 1")
    sums = [0.0] * bins
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        bin_index = min(int((confidence - 0.5) * 2 * bins), bins - 1)
        sums[bin_index] += _right(margin) - confidence
    return sum(map(abs, sums)) / len(margins) if margins else math.nan


def _rate(pairs: Sequence[Pair], margins: Sequence[float]) -> tuple[float, float, float]:
    """Return the accuracy and the ends of its interval."""
    accuracy = rate_interval([_right(margin) for margin in margins], [pair.prompt.id for pair in pairs])
    return accuracy.rate, accuracy.low, accuracy.high


def _right(margin: float) -> float:
    """Return 1 for a positive margin, 0.5 for a tie, else 0."""
    return 0.5 * ((margin > 0) + (margin >= 0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
