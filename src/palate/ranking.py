"""The agreement of a judge's scores with ranked answers: the five figures of Yuan et al. 2024.

The paper (arXiv:2401.10020, Table 4) does not say how ties in the judge's scores count. Here:

- Two answers that people rank alike are no pair.
- Pairwise accuracy counts a tie of the judge, and a pair with an answer that has no clear score, as one half;
  the strict accuracy counts both as wrong. The rates of both are reported.
- Exact match needs every pair of the prompt to be ordered strictly as people do.
- 5-best is about answers with the highest score of the scale; without any, it is left out.
- Spearman (mid-ranks) and Kendall (tau-b) are means over prompts. Prompts whose usable scores, or whose
  ranks, are all equal have no correlation; they are left out and counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from palate.statistics import rate_interval


@dataclass(frozen=True)
class Ranked:
    """The answers of one prompt.

    Attributes:
        gold: people's numbers; higher is better. (N,)
        scores: the judge's scores; None without a clear score. (N,)
    """

    gold: Sequence[float]
    scores: Sequence[float | None]

    def pairs(self, gap: float = 0.0) -> Iterator[tuple[float | None, float | None]]:
        """Yield the scores of the better and the worse answer of each pair that people order.

        Args:
            gap: the smallest difference of people's numbers.
        """
        places = range(len(self.gold))
        for i in places:
            for j in places:
                if self.gold[i] > self.gold[j] and self.gold[i] - self.gold[j] >= gap:
                    yield self.scores[i], self.scores[j]


def outcome(better: float | None, worse: float | None) -> float:
    """Return 1 if the judge orders a pair as people do, 0 if the other way, 0.5 for a tie or no score."""
    if better is None or worse is None or better == worse:
        return 0.5
    return float(better > worse)


def judge_metrics(items: Sequence[Ranked], *, gap: float = 0.0, perfect: float = 5.0) -> dict[str, float]:
    """Return the agreement of a judge with ranked answers; figures without data are left out.

    Args:
        items: the answers, prompt by prompt.
        gap: the smallest difference of people's numbers that makes a pair; exact match uses the same pairs.
        perfect: the highest score of the judge's scale.

    Returns:
        `pairwise` with its 95 % interval (`pairwise_low`, `pairwise_high`), `pairwise_strict`, `ties`,
        `unclear` (share of pairs without a clear score), `best` (5-best), `exact`, `spearman`, `kendall`,
        `uncorrelated` (share of prompts without a correlation), `pairs` (their number).
    """
    pairs = [(i, better, worse) for i, item in enumerate(items) for better, worse in item.pairs(gap)]
    if not pairs:
        return {"pairs": 0}
    outcomes = [outcome(better, worse) for _, better, worse in pairs]
    rate, low, high, _ = rate_interval(outcomes, [i for i, _, _ in pairs])
    unclear = sum(better is None or worse is None for _, better, worse in pairs)
    level = sum(result == 0.5 for result in outcomes) - unclear
    ordered = [ordering for item in items if (ordering := list(item.pairs(gap)))]
    numbers = {
        "pairwise": rate,
        "pairwise_low": low,
        "pairwise_high": high,
        "pairwise_strict": sum(result == 1.0 for result in outcomes) / len(pairs),
        "ties": level / len(pairs),
        "unclear": unclear / len(pairs),
        "exact": fmean(all(outcome(*pair) == 1.0 for pair in ordering) for ordering in ordered),
        "pairs": len(pairs),
    }
    top = [
        item.gold[i] == max(item.gold)
        for item in items
        for i, score in enumerate(item.scores)
        if score == perfect
    ]
    if top:
        numbers["best"] = fmean(top)
    usable = [_usable(item) for item in items]
    both = [(spearman(*own), kendall(*own)) for own in usable if _varies(own)]
    if both:
        numbers["spearman"], numbers["kendall"] = (fmean(column) for column in zip(*both, strict=True))
    numbers["uncorrelated"] = 1 - len(both) / len(items)
    return numbers


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the correlation of the mid-ranks of two lists, neither of them constant."""
    a, b = _ranks(one), _ranks(other)
    mean_a, mean_b = fmean(a), fmean(b)
    joint = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return joint / math.sqrt(sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b))


def kendall(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Kendall's tau-b of two lists, neither of them constant."""
    places = range(len(one))
    signs = [(_sign(one[i] - one[j]), _sign(other[i] - other[j])) for i in places for j in places if i < j]
    joint = sum(a * b for a, b in signs)
    return joint / math.sqrt(sum(a * a for a, _ in signs) * sum(b * b for _, b in signs))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, from 0; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (values.count(value) - 1) / 2 for value in values]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _usable(item: Ranked) -> tuple[list[float], list[float]]:
    """Return gold and scores of the answers that have a clear score."""
    both = [(gold, score) for gold, score in zip(item.gold, item.scores, strict=True) if score is not None]
    return [gold for gold, _ in both], [score for _, score in both]


def _varies(own: tuple[list[float], list[float]]) -> bool:
    return all(len(set(values)) > 1 for values in own)
