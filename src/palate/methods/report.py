"""Numbers that methods with annotated samples log alike."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from palate.select import Drop
from palate.types import Group


def group_numbers(groups: Sequence[Group], dropped: Mapping[Drop, int]) -> dict[str, float]:
    """What the annotator said of fresh samples, how long they were, and what became of the groups.

    Names are TRL's: `objective/scores` is the annotator's reward (`rewards/*` are implicit rewards),
    `objective/scores_margin` the gap of best and worst in a group; lengths are in tokens.
    """
    rewards = [r for group in groups for r in group.rewards or () if r is not None]
    gaps = [max(usable) - min(usable) for group in groups if len(usable := _usable(group)) > 1]
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    ended = [len(c.token_ids) for c in completions if c.finish != "length"]
    numbers: dict[str, float] = {
        "objective/unusable": len(completions) - len(rewards),
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(completions),
        "val/contain_eos_token": sum(c.finish == "eos" for c in completions) / len(completions),
        "frac_reward_zero_std": sum(gap == 0 for gap in gaps) / len(gaps) if gaps else 0.0,
        "pairs/kept": len(groups) - sum(dropped.values()),
        "pairs/dropped": sum(dropped.values()),
        **{f"pairs/dropped_{reason}": count for reason, count in dropped.items()},
    }
    if rewards:
        numbers["objective/scores"] = mean = sum(rewards) / len(rewards)
        numbers["objective/scores_std"] = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    if gaps:
        numbers["objective/scores_margin"] = sum(gaps) / len(gaps)
    if ended:
        numbers["completions/mean_terminated_length"] = sum(ended) / len(ended)
    return numbers | _parts(groups)


def _usable(group: Group) -> list[float]:
    return [r for r in group.rewards or () if r is not None]


def _parts(groups: Sequence[Group]) -> dict[str, float]:
    """Mean of each reward that was weighed in, where there are several."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for name, values in group.parts.items():
            found[name] += [value for value in values if value is not None]
    return {f"objective/scores/{name}": sum(values) / len(values) for name, values in found.items() if values}
