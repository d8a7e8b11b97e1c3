"""What rules ask of a group: its usable rewards, a part of it, what is the same, a random order."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from random import Random
from typing import TypeVar

from palate.types import Completion, Group

T = TypeVar("T")


def usable(group: Group) -> dict[int, float]:
    """The finite rewards by position, in order; one that is None, infinite or not a number is left out."""
    if group.rewards is None:
        raise ValueError(f"{name(group)} has no rewards: annotate it before selecting from it")
    return {i: r for i, r in enumerate(group.rewards) if r is not None and math.isfinite(r)}


def take(group: Group, positions: Sequence[int]) -> Group:
    """The completions at the given positions, in that order, with what is known of each."""
    return replace(
        group,
        completions=tuple(group.completions[i] for i in positions),
        rewards=None if group.rewards is None else tuple(group.rewards[i] for i in positions),
        parts={part: tuple(values[i] for i in positions) for part, values in group.parts.items()},
    )


def same(a: Completion, b: Completion) -> bool:
    """Whether there is nothing to prefer: the same tokens, or the same text but for space around it."""
    return a.token_ids == b.token_ids or a.text.strip() == b.text.strip()


def unique(group: Group, positions: Iterable[int]) -> list[int]:
    """Of the given positions those whose completion is not the `same` as one at a position kept before."""
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
    """In random order, every order alike.

    It asks only for `rng.random()`, which alone stays the same from one Python version to the next.
    """
    keys = [rng.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=keys.__getitem__)]


def check_tie(tie: float) -> None:
    """A difference of reward, 0 <= tie < infinity."""
    if not 0 <= tie < math.inf:
        raise ValueError(f"tie is {tie}, expected a finite number, 0 or above")


def name(group: Group) -> str:
    """The group in a message."""
    return f"the group of prompt {group.prompt.where or group.prompt.id}"
