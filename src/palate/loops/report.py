"""Metrics that all methods with annotated samples log."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from palate.select import Drop
from palate.types import Group


def group_numbers(
    groups: Sequence[Group], dropped: Mapping[Drop, int], *, kept: int | None = None
) -> dict[str, float]:
    """Return the metrics of fresh samples (`sample_numbers`) and the counts of kept and dropped pairs.

    Args:
        groups: annotated groups.
        dropped: number of groups or pairs that a rule dropped, by reason.
        kept: number of pairs; default: the number of groups that were not dropped.
    """
    return {
        **sample_numbers(groups),
        "pairs/kept": len(groups) - sum(dropped.values()) if kept is None else kept,
        "pairs/dropped": sum(dropped.values()),
        **{f"pairs/dropped_{reason}": count for reason, count in dropped.items()},
    }


def sample_numbers(groups: Sequence[Group]) -> dict[str, float]:
    """Return rewards, lengths and log-probabilities of fresh samples.

    Names are TRL's: `objective/scores` is the annotator's reward (`rewards/*` are implicit rewards),
    `objective/scores_margin` the difference of best and worst in a group; lengths are in tokens.
    `logps/fresh` is ours, see `fresh_logps`.
    """
    rewards = [r for group in groups for r in group.rewards or () if r is not None]
    gaps = [max(usable) - min(usable) for group in groups if len(usable := _usable(group)) > 1]
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    ended = [len(c.token_ids) for c in completions if c.finish != "length"]
    numbers: dict[str, float] = {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(completions),
        "val/contain_eos_token": sum(c.finish == "eos" for c in completions) / len(completions),
    }
    if any(group.rewards is not None for group in groups):
        numbers["objective/unusable"] = len(completions) - len(rewards)
        numbers["frac_reward_zero_std"] = sum(gap == 0 for gap in gaps) / len(gaps) if gaps else 0.0
    if rewards:
        numbers["objective/scores"] = mean = sum(rewards) / len(rewards)
        numbers["objective/scores_std"] = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    if gaps:
        numbers["objective/scores_margin"] = sum(gaps) / len(gaps)
    if ended:
        numbers["completions/mean_terminated_length"] = sum(ended) / len(ended)
    return numbers | fresh_logps(groups) | _parts(groups)


def fresh_logps(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean log-probability per token, in nats, of sampled completions under their own policy.

    `logps/training` is the same mean over the training tokens under the trained policy; the difference shows
    the shift between the two distributions. Completions from data are ignored.
    """
    logps = [logp for group in groups for c in group.completions for logp in c.logps or ()]
    return {"logps/fresh": sum(logps) / len(logps)} if logps else {}


def _usable(group: Group) -> list[float]:
    return [r for r in group.rewards or () if r is not None]


def _parts(groups: Sequence[Group]) -> dict[str, float]:
    """Return the mean of each reward, if several are added."""
    usable: defaultdict[str, list[float]] = defaultdict(list)
    for group in groups:
        for name, values in group.parts.items():
            usable[name] += [value for value in values if value is not None]
    return {
        f"objective/scores/{name}": sum(values) / len(values) for name, values in usable.items() if values
    }
