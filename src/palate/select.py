"""How a group of annotated completions becomes a pair to learn from, or is dropped with a reason.

A pair that says nothing, or whose order rests on nothing, is never trained on: it is dropped and
counted. Rules are functions of one group; `select_pairs` applies one to many groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from operator import itemgetter
from typing import NamedTuple

from palate.types import Completion, Group, Pair


class Drop(StrEnum):
    """Why a group gave no pair."""

    TIE = "tie"
    """The rewards of best and worst lie too close together."""
    IDENTICAL = "identical"
    """Best and worst are the same text, whatever their rewards."""
    UNUSABLE = "unusable"
    """Fewer than two completions have a usable reward."""


Rule = Callable[[Group], Pair | Drop]
"""Makes a pair of an annotated group, or says why there is none."""


class Selected(NamedTuple):
    """What a rule made of many groups: the pairs in order, and how many groups it dropped for each reason."""

    pairs: tuple[Pair, ...]
    dropped: Mapping[Drop, int]
    """Has every reason, with 0 where no group was dropped for it."""


def best_vs_worst(group: Group, *, tie: float = 0.0) -> Pair | Drop:
    """The completion of highest reward against the one of lowest.

    Of several best ones the first is chosen; of several worst ones, the first whose text differs from
    it is rejected. A reward that is None, infinite or not a number takes its completion out. Where best
    and worst are the same text, the group is dropped as identical even if their rewards differ, as a
    noisy judge's may.

    Args:
        group: With rewards.
        tie: Largest difference of reward that still counts as a tie, >= 0.

    Returns:
        The pair, its margin the difference of reward, > tie; or why there is none.
    """
    _check_tie(tie)
    scored = zip(group.completions, _rewards(group), strict=True)
    usable = [(completion, r) for completion, r in scored if r is not None and math.isfinite(r)]
    if len(usable) < 2:
        return Drop.UNUSABLE
    chosen, high = max(usable, key=itemgetter(1))  # the first of equals
    low = min(r for _, r in usable)
    rejected = next((other for other, r in usable if r == low and not _same(other, chosen)), None)
    if rejected is None:
        return Drop.IDENTICAL
    if high - low <= tie:
        return Drop.TIE
    return Pair(group.prompt, chosen, rejected, margin=high - low)


def pair_of_two(group: Group, *, tie: float = 0.0) -> Pair | Drop:
    """The better of exactly two completions against the other: `best_vs_worst` where nothing is left out."""
    if len(group.completions) != 2:
        raise ValueError(f"{_name(group)} has {len(group.completions)} completions, expected 2")
    return best_vs_worst(group, tie=tie)


def select_pairs(groups: Iterable[Group], rule: Rule) -> Selected:
    """The pairs that a rule makes of annotated groups, and a count of the groups that gave none."""
    pairs: list[Pair] = []
    dropped = dict.fromkeys(Drop, 0)
    for group in groups:
        _rewards(group)  # raises even if the rule would not look
        made = rule(group)
        if isinstance(made, Pair):
            pairs.append(made)
        else:
            dropped[made] += 1
    return Selected(tuple(pairs), dropped)


def _rewards(group: Group) -> tuple[float | None, ...]:
    if group.rewards is None:
        raise ValueError(f"{_name(group)} has no rewards: annotate it before making pairs")
    return group.rewards


def _same(a: Completion, b: Completion) -> bool:
    return a.token_ids == b.token_ids or a.text.strip() == b.text.strip()


def _check_tie(tie: float) -> None:
    if not 0 <= tie < math.inf:
        raise ValueError(f"tie is {tie}, expected a finite number, 0 or above")


def _name(group: Group) -> str:
    return f"the group of prompt {group.prompt.where or group.prompt.id}"
