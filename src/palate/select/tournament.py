"""Pairs that are drawn before annotation, and annotated afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from palate.errors import AnnotatorError
from palate.select._group import check_tie, same, shuffled, take, usable
from palate.select.pairs import Drop, Selected, pair_of_two
from palate.types import Group, Pair


def first_round_pairs(group: Group, rng: Random) -> list[Group]:
    """Draw random disjoint pairs of a group's completions to annotate, each as a group of two.

    RSO's first-round ranking (Liu et al. 2023, arXiv:2309.06657). Annotate the groups of two, then form
    pairs with `select_pairs(twos, pair_of_two)`. If the group has rewards, the groups of two keep them, and
    annotation is not needed.

    Args:
        group: A group of n completions, with or without rewards.
        rng: Only its `random()` is called, which returns the same numbers in every version of Python.

    Returns:
        n / 2 groups of two completions; if n is odd, one completion is not used.
    """
    order = shuffled(range(len(group.completions)), rng)
    return [take(group, two) for two in zip(order[::2], order[1::2], strict=False)]


def tournament_pairs(
    groups: Sequence[Group],
    annotate: Callable[[Sequence[Group]], list[Group]],
    *,
    rng: Random,
    tie: float = 0.0,
) -> Selected:
    """Play a knock-out tournament among each group's completions; return winner and loser of each match.

    Winners advance to the next round until one is left; a completion without an opponent skips the round and
    plays first in the next round. SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) and RSO (Liu et al. 2023,
    arXiv:2309.06657) pair their samples by tournament. The draw is random.

    A match without a pair is counted, and one of its completions still advances: the completion with the
    higher reward or with the only usable reward, since its next matches are more informative; if the rewards
    do not decide, the first, which is either with equal probability due to the random draw. A match between
    two equal completions is not annotated.

    Args:
        groups: Groups of any number of completions. Existing rewards are passed to `annotate`.
        annotate: Adds rewards to groups of two completions. It is called once per round, for the matches
            of all groups together.
        rng: Only its `random()` is called, which returns the same numbers in every version of Python.
        tie: Largest reward difference that counts as a tie, >= 0.

    Returns:
        The pairs, group by group in order of play, each with the margin of its match; and the number of
        matches without a pair, by reason. n completions play n - 1 matches in ceil(log2(n)) rounds.

    Raises:
        AnnotatorError: `annotate` returns a different number of groups than it received.
    """
    check_tie(tie)
    draws = [shuffled(range(len(group.completions)), rng) for group in groups]
    pairs: list[list[Pair]] = [[] for _ in groups]
    dropped = dict.fromkeys(Drop, 0)
    while any(len(draw) > 1 for draw in draws):
        matches = [
            (g, two) for g, draw in enumerate(draws) for two in zip(draw[::2], draw[1::2], strict=False)
        ]
        draws = [draw[len(draw) // 2 * 2 :] for draw in draws]
        results = _play([take(groups[g], two) for g, two in matches], annotate)
        for (g, two), result in zip(matches, results, strict=True):
            made = pair_of_two(result, tie=tie)
            if isinstance(made, Pair):
                pairs[g].append(made)
            else:
                dropped[made] += 1
            rewards = usable(result)
            draws[g].append(two[rewards.get(1, -math.inf) > rewards.get(0, -math.inf)])
    return Selected(tuple(pair for own in pairs for pair in own), dropped)


def _play(matches: Sequence[Group], annotate: Callable[[Sequence[Group]], list[Group]]) -> list[Group]:
    """Return the matches with rewards, annotated in one call."""
    different = [match for match in matches if not same(*match.completions)]
    results = annotate(different) if different else []
    if len(results) != len(different):
        raise AnnotatorError(
            f"the annotator returned {len(results)} groups for {len(different)}; expected one each"
        )
    answers = iter(results)
    return [match.annotated((0.0, 0.0)) if same(*match.completions) else next(answers) for match in matches]
