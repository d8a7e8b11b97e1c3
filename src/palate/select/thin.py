"""Rules that keep some completions of a group and return a smaller group.

`select_completions` applies a rule to many groups and counts the dropped completions by reason.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import NamedTuple

from palate.select._group import same, shuffled, take, unique, usable
from palate.select.pairs import Drop
from palate.types import Group


class Thinned(NamedTuple):
    """The result of a rule on many groups: smaller groups, and the number of completions dropped."""

    groups: tuple[Group, ...]
    """The smaller groups in order, without empty ones."""
    dropped: Mapping[Drop, int]
    """The count of every reason, including zeros."""


def distinct(group: Group) -> Group:
    """Return the group without repetitions: of completions with the same tokens or text, only the first.

    Rewards are optional: used before annotation, it saves the cost of annotating repetitions.
    """
    return take(group, unique(group, range(len(group.completions))))


def above_threshold(group: Group, tau: float) -> Group:
    """Return the group of completions with a reward above tau, in their order.

    The filter of ReST's improve step (Gulcehre et al. 2023, arXiv:2308.08998), where tau rises from one
    step to the next. Repeated completions are all kept.

    Args:
        group: A group with rewards; completions without a usable reward are dropped.
        tau: Threshold in units of reward; completions at exactly tau are dropped.

    Returns:
        The smaller group, which may be empty.
    """
    if math.isnan(tau):
        raise ValueError("tau is not a number, expected a reward as the threshold")
    return take(group, [i for i, r in usable(group).items() if r > tau])


def top_k(group: Group, k: int) -> Group:
    """Return the group of the k completions with the highest rewards, the best first.

    With k = 1 this is the selection of rejection-sampling fine-tuning (Touvron et al. 2023,
    arXiv:2307.09288). Only the first of repeated completions counts, so a noisy annotator's most favourable
    verdict on a repeated text has no advantage. If rewards are equal, the first completion comes first.

    Args:
        group: A group with rewards; completions without a usable reward are dropped.
        k: Number of completions to keep, >= 1; all are kept if there are fewer.

    Returns:
        The smaller group, without repetitions.
    """
    _check_k(k)
    rewards = usable(group)
    return take(group, sorted(unique(group, rewards), key=lambda i: -rewards[i])[:k])


def rejection_sample(group: Group, k: int, *, beta: float, rng: Random) -> Group:
    """Select k samples that follow a better policy from samples of a policy, by statistical rejection.

    The samples of a policy π become samples of approximately π(y) exp(r(y)/β), the optimal policy under a KL
    penalty β against π. Each sweep visits the remaining candidates and accepts each with probability
    exp((r - r_max)/β), where r_max is the highest reward at the start of the sweep. Sweeps repeat until k
    are accepted. Each sweep accepts the best remaining candidate, so there are at most k sweeps. Liu et al.
    2023, arXiv:2309.06657, Algorithm 1. With a pairwise ranker, r is the logit of its probability against a
    fixed completion, clipped away from 0 and 1.

    Ours: sweeps use a random order, since a sweep stops at the k-th acceptance and would otherwise favour
    the first candidates. Only the first of repeated completions is a candidate.

    Args:
        group: A group with rewards; completions without a usable reward are dropped.
        k: Number of completions to accept, >= 1; all are accepted if there are no more than k.
        beta: Temperature in units of reward, >= 0; 0.5 in the paper. 0 gives the result of `top_k`; rewards
            matter less as beta grows, and infinity is a uniform draw without replacement.
        rng: Python's random generator. Only its `random()` is called, which returns the same numbers for a
            seed in every version of Python; the result depends only on these numbers and the group.

    Returns:
        The accepted completions and their rewards, in order of acceptance.
    """
    _check_k(k)
    if not beta >= 0:
        raise ValueError(f"beta is {beta}, expected a number, 0 or above")
    if beta == 0:
        return top_k(group, k)
    rewards = usable(group)
    candidates = shuffled(unique(group, rewards), rng)
    accepted: list[int] = []
    while candidates and len(accepted) < k:
        highest = max(rewards[i] for i in candidates)
        left = []
        for i in candidates:
            if len(accepted) < k and rng.random() < math.exp((rewards[i] - highest) / beta):
                accepted.append(i)
            else:
                left.append(i)
        candidates = left
    return take(group, accepted)


def select_completions(groups: Iterable[Group], rule: Callable[[Group], Group]) -> Thinned:
    """Apply a rule to groups; return the smaller groups and the number of dropped completions by reason.

    Args:
        groups: Groups, annotated if the rule needs rewards.
        rule: Returns a group of some of a group's completions, such as a rule of this module.

    Returns:
        The smaller groups, and the number of dropped completions by reason: unusable without a usable
        reward, identical if the completion repeats a kept one, else passed over.
    """
    kept: list[Group] = []
    dropped = dict.fromkeys(Drop, 0)
    for group in groups:
        thinned = rule(group)
        if thinned.completions:
            kept.append(thinned)
        usable_ones = range(len(group.completions)) if group.rewards is None else usable(group)
        there = Counter(id(completion) for completion in thinned.completions)
        for i, completion in enumerate(group.completions):
            if there[id(completion)]:
                there[id(completion)] -= 1
            elif i not in usable_ones:
                dropped[Drop.UNUSABLE] += 1
            elif any(same(completion, other) for other in thinned.completions):
                dropped[Drop.IDENTICAL] += 1
            else:
                dropped[Drop.PASSED_OVER] += 1
    return Thinned(tuple(kept), dropped)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1 completion to keep")
