"""Helpers of selection rules: usable rewards, parts of a group, equality, random order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from palate.types import Completion, Group

T = TypeVar("T")


def usable(group: Group) -> dict[int, float]:
    """Return the finite rewards by position, in order; rewards that are None, infinite or NaN are skipped."""
    if group.rewards is None:
        raise ValueError(f"{name(group)} has no rewards: annotate it before the selection")
    return {i: r for i, r in enumerate(group.rewards) if r is not None and math.isfinite(r)}


def take(group: Group, positions: Sequence[int]) -> Group:
    """Return the group of the completions at the given positions, in that order, with rewards and parts."""
    return replace(
        group,
        completions=tuple(group.completions[i] for i in positions),
        rewards=None if group.rewards is None else tuple(group.rewards[i] for i in positions),
        parts={part: tuple(values[i] for i in positions) for part, values in group.parts.items()},
    )


def same(a: Completion, b: Completion) -> bool:
    """Return whether two completions have the same tokens, or the same text up to surrounding space."""
    return a.token_ids == b.token_ids or a.text.strip() == b.text.strip()


def unique(group: Group, positions: Iterable[int]) -> list[int]:
    """Return the positions without those whose completion is the `same` as an earlier one."""
    kept: list[int] = []
    tokens, texts = set(), set()
    for i in positions:
        completion = group.completions[i]
        if completion.token_ids not in tokens and completion.text.strip() not in texts:
            kept.append(i)
            tokens.add(completion.token_ids)
            texts.add(completion.text.strip())
    return kept


def shuffled(items: Sequence[T], rng: Random) -> list[T]:
    """Return the items in random order; all orders are equally likely.

    Only `rng.random()` is called, the one method whose results are the same in all Python versions.
    """
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def check_tie(tie: float) -> None:
    """Check the reward difference of a tie: 0 <= tie < infinity."""
    if not 0 <= tie < math.inf:
        raise ValueError(f"tie is {tie}, expected a finite number, 0 or above")


def name(group: Group) -> str:
    """Return a name of the group for messages."""
    return f"the group of prompt {group.prompt.where or group.prompt.id}"
