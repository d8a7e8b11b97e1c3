"""Pairs that are drawn before anyone has said which completion is the better one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

from palate.errors import AnnotatorError
from palate.select._group import check_tie, same, shuffled, take, usable
from palate.select.pairs import Drop, Selected, pair_of_two
from palate.types import Group, Pair


def first_round_pairs(group: Group, rng: Random) -> list[Group]:
    """Random disjoint pairs of a group's completions, each a group of two, to be labelled.

    RSO's first-round ranking (Liu et al. 2023, arXiv:2309.06657). Annotate the groups of two and make
    pairs of them with `select_pairs(twos, pair_of_two)`; where the group has rewards already, each has
    kept its own, and annotation may be left out.

    Args:
        group: Of n completions, which may have no rewards.
        rng: Only its `random()` is called, which stays the same in every version of Python.

    Returns:
        n / 2 groups of two completions; with n odd, one completion is in none of them.
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
    """Winner and loser of each match of a knock-out tournament among each group's completions.

    Winners go on to the next round until one is left; who finds no opponent in a round sits it out and
    plays first in the next. SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) and RSO (Liu et al. 2023,
    arXiv:2309.06657) pair their samples by tournament. The draw is random.

    A match that makes no pair is counted, and one of the two goes on all the same: the one with the
    higher reward, or with the only usable one, for its next matches tell more; where rewards say
    nothing, the first, which by the random draw is either with equal probability. A match between
    completions that are the same is not annotated.

    Args:
        groups: Of any number of completions each. Rewards they may have are passed to `annotate`.
        annotate: Gives rewards to groups of two completions. It is called once a round, for the matches
            of all groups together.
        rng: Only its `random()` is called, which stays the same in every version of Python.
        tie: Largest difference of reward that still counts as a tie, >= 0.

    Returns:
        The pairs, group by group in order of play, each with the margin of its match; and a count of the
        matches that made none. Of n completions of a group there are n - 1 matches, in as many rounds as
        n has to be halved, rounding up, to come to 1.

    Raises:
        AnnotatorError: when `annotate` gives another number of groups than it was asked for.
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
    return Selected(tuple(pair for found in pairs for pair in found), dropped)


def _play(matches: Sequence[Group], annotate: Callable[[Sequence[Group]], list[Group]]) -> list[Group]:
    """The matches with rewards, asked for at once."""
    asked = [match for match in matches if not same(*match.completions)]
    results = annotate(asked) if asked else []
    if len(results) != len(asked):
        raise AnnotatorError(f"the annotator gave {len(results)} groups for {len(asked)}; expected one each")
    answers = iter(results)
    return [match.annotated((0.0, 0.0)) if same(*match.completions) else next(answers) for match in matches]
