"""An annotator within a run: what it said is kept, and is not asked for again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from palate.annotate import Annotator
from palate.journal import Journal, Reward
from palate.memory import content_key, group_key, key_of
from palate.types import Group

SLICE = 64
"""Groups annotated between two commits."""

SAID = 5
"""Prompts named for having no usable reward; the rest is counted in `objective/unusable`."""


def journaled(
    annotate: Annotator,
    journal: Journal,
    *,
    name: str,
    observe: Callable[[str, int], None],
    say: Callable[[str], None],
) -> Annotator:
    """The annotator, with its answers taken from the journal where they are there, and kept there.

    Args:
        annotate: asked for what is not known.
        journal: of the run.
        name: tells several annotators of a run apart.
        observe: told of the work done, in completions.
        say: told of prompts for which nothing usable was said.
    """
    said: set[str] = set()

    def annotated(groups: Sequence[Group]) -> list[Group]:
        slices = math.ceil(len(groups) / SLICE)
        found: list[Group] = []
        for i in range(slices):
            part = groups[i * len(groups) // slices : (i + 1) * len(groups) // slices]
            found += _slice(annotate, journal, name, part)
            observe("annotate", sum(len(group.completions) for group in part))
        for group in found:
            _tell(group, said, say)
        return found

    return annotated


def _slice(annotate: Annotator, journal: Journal, name: str, groups: Sequence[Group]) -> list[Group]:
    keys = [_group_key(name, group) for group in groups]
    unknown = {key: group for key, group in zip(keys, groups, strict=True) if journal.rewards(key) is None}
    if unknown:
        fresh = annotate(list(unknown.values()))
        journal.keep_rewards(
            [(key, group_key(group), _rows(group)) for key, group in zip(unknown, fresh, strict=True)]
        )
    return [_recalled(group, journal.rewards(key) or []) for key, group in zip(keys, groups, strict=True)]


def _group_key(name: str, group: Group) -> str:
    """A judge's word on a completion may rest on its neighbours, and a rule's on the row's other columns."""
    return key_of(name, dict(group.prompt.columns), group_key(group))


def _rows(group: Group) -> list[Reward]:
    assert group.rewards is not None
    return [
        (content_key(group.prompt, c), reward, {part: values[j] for part, values in group.parts.items()})
        for j, (c, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
    ]


def _recalled(group: Group, rows: Sequence[tuple[float | None, Mapping[str, float | None]]]) -> Group:
    parts = {name: tuple(own[name] for _, own in rows) for name in rows[0][1]}
    return replace(group, rewards=tuple(reward for reward, _ in rows), parts={**group.parts, **parts})


def _tell(group: Group, said: set[str], say: Callable[[str], None]) -> None:
    unusable = sum(reward is None for reward in group.rewards or ())
    if unusable and len(said) < SAID and group.prompt.id not in said:
        said.add(group.prompt.id)
        say(
            f"no usable reward for {unusable} of {len(group.completions)} completions of "
            f"{group.prompt.text[:60]!r} {group.prompt.where}: left out"
        )
