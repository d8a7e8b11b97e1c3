"""An annotator within a run: the journal stores its answers, so each question is asked only once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from palate.annotate import Annotator
from palate.journal import Journal, Reward
from palate.memory import content_key, group_key, key_of
from palate.types import Group
from palate.world import current

SLICE = 64
"""Number of groups to annotate between two commits."""

MOST_WARNINGS = 5
"""Number of warnings about prompts without a usable reward; `objective/unusable` counts all of them."""


def journaled(
    annotate: Annotator,
    journal: Journal,
    *,
    name: str | Callable[[], str],
    start: Callable[[], None],
    observe: Callable[[str, int], None],
    say: Callable[[str], None],
) -> Annotator:
    """Return the annotator with its answers stored in the journal, and read from there if known.

    Args:
        annotate: annotates the groups that the journal does not know.
        journal: the run's journal.
        name: distinguishes the annotators of a run; a function if it changes, as for a policy that judges.
        start: called before the first question, which starts the run.
        observe: receives reports of work, in completions.
        say: shows warnings about prompts without usable rewards.
    """
    warned: set[str] = set()

    def annotated(groups: Sequence[Group]) -> list[Group]:
        start()
        own = name if isinstance(name, str) else name()
        slices = math.ceil(len(groups) / SLICE)
        results: list[Group] = []
        for i in range(slices):
            part = groups[i * len(groups) // slices : (i + 1) * len(groups) // slices]
            results += _slice(annotate, journal, own, part)
            observe("annotate", sum(len(group.completions) for group in part))
        for group in results:
            _warn(group, warned, say)
        return results

    return annotated


def _slice(annotate: Annotator, journal: Journal, name: str, groups: Sequence[Group]) -> list[Group]:
    """Annotate groups; of several processes, all ask for what the journal of process 0 does not know."""
    world = current()
    keys = [_group_key(name, group) for group in groups]
    known = world.lead("rewards known", lambda: [journal.rewards(key) is not None for key in keys])
    unknown = {key: group for key, group, there in zip(keys, groups, known, strict=True) if not there}
    if unknown:
        fresh = annotate(list(unknown.values()))
        if world.leads:
            journal.keep_rewards(
                [(key, group_key(group), _rows(group)) for key, group in zip(unknown, fresh, strict=True)]
            )
    rows = world.lead("recall rewards", lambda: [journal.rewards(key) or [] for key in keys])
    return [_recalled(group, own) for group, own in zip(groups, rows, strict=True)]


def _group_key(name: str, group: Group) -> str:
    """Return a key of all inputs: a judge may compare the completions, and a rule may read other columns."""
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


def _warn(group: Group, warned: set[str], say: Callable[[str], None]) -> None:
    unusable = sum(reward is None for reward in group.rewards or ())
    if unusable and len(warned) < MOST_WARNINGS and group.prompt.id not in warned:
        warned.add(group.prompt.id)
        say(
            f"no usable reward for {unusable} of {len(group.completions)} completions of "
            f"{' '.join((repr(group.prompt.text[:60]), group.prompt.where)).rstrip()}: skipped"
        )
