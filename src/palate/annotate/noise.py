"""Label noise: a weak annotator made from a good one, for studies."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from palate.annotate.base import Annotator
from palate.annotate.judges.records import digest
from palate.types import Group


def with_label_noise(annotate: Annotator, rate: float, *, seed: int = 0) -> Annotator:
    """Swap the winner of a share of comparisons.

    Each two completions of a prompt are compared by their rewards, and the worse one wins with the
    probability `rate`. A completion's reward is then its share of won comparisons: with two completions, 1
    and 0. Equal rewards stay a tie, one half. The draw depends on the seed and the texts alone, so the same
    comparison has the same outcome wherever it occurs.

    Args:
        annotate: the annotator whose comparisons are made noisy.
        rate: probability that a comparison is swapped, in [0, 1].
        seed: seed of the draws.
    """

    def annotated(groups: Sequence[Group]) -> list[Group]:
        return [_noisy(group, rate, seed) for group in annotate(groups)]

    return annotated if rate > 0 else annotate


def _noisy(group: Group, rate: float, seed: int) -> Group:
    assert group.rewards is not None
    wins: dict[int, list[float]] = {}
    usable = [i for i, reward in enumerate(group.rewards) if reward is not None]
    for i, j in combinations(usable, 2):
        difference = (group.rewards[i] or 0.0) - (group.rewards[j] or 0.0)
        won = 0.5 * ((difference > 0) + (difference >= 0))
        if _is_swapped(group, i, j, rate, seed):
            won = 1.0 - won
        wins.setdefault(i, []).append(won)
        wins.setdefault(j, []).append(1.0 - won)
    shares = tuple(sum(wins[i]) / len(wins[i]) if i in wins else None for i in range(len(group.rewards)))
    return group.annotated(shares)


def _is_swapped(group: Group, i: int, j: int, rate: float, seed: int) -> bool:
    texts = sorted((group.completions[i].text, group.completions[j].text))
    return int(digest(["label noise", seed, group.prompt.id, texts]), 16) < rate * 2.0**64
