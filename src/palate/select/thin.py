"""Which completions of a group are kept: rules from groups to smaller groups.

`select_completions` applies one to many groups and counts what was left out, by reason.
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
    """What a rule kept of many groups, and how many completions it left out for each reason."""

    groups: tuple[Group, ...]
    """In order; a group of which nothing was kept is not among them."""
    dropped: Mapping[Drop, int]
    """Has every reason, with 0 where no completion was left out for it."""


def distinct(group: Group) -> Group:
    """The group without repetitions: of completions of the same tokens or text, the first.

    It asks for no rewards: before annotation it saves that of the repetitions.
    """
    return take(group, unique(group, range(len(group.completions))))


def above_threshold(group: Group, tau: float) -> Group:
    """The completions of a reward above tau, in their order.

    The filter of ReST's improve step (Gulcehre et al. 2023, arXiv:2308.08998), where tau rises from one
    step to the next. Completions that are the same are all kept.

    Args:
        group: With rewards; completions without a usable one are left out.
        tau: In units of reward; the completions at tau are left out.

    Returns:
        The group of them, which may be empty.
    """
    if math.isnan(tau):
        raise ValueError("tau is not a number, expected a reward above which completions are kept")
    return take(group, [i for i, r in usable(group).items() if r > tau])


def top_k(group: Group, k: int) -> Group:
    """The k completions of highest reward, the best first.

    With k = 1 the selection of rejection-sampling fine-tuning (Touvron et al. 2023, arXiv:2307.09288).
    Of completions that are the same the first counts, so that a noisy annotator's luckiest verdict on a
    repeated text has no advantage; of several of equal reward, the first.

    Args:
        group: With rewards; completions without a usable one are left out.
        k: How many, >= 1; all of them where there are fewer.

    Returns:
        The group of them, without repetitions.
    """
    _check_k(k)
    rewards = usable(group)
    return take(group, sorted(unique(group, rewards), key=lambda i: -rewards[i])[:k])


def rejection_sample(group: Group, k: int, *, beta: float, rng: Random) -> Group:
    """Thin samples of one policy to k samples of a better one, by statistical rejection sampling.

    Of samples of a policy π it makes samples of about π(y) exp(r(y)/β), the best policy at a KL cost of
    β against π. A candidate is accepted with the probability exp((r - r_max)/β), where r_max is the
    highest reward of the candidates left when a sweep over them begins, and is then a candidate no
    more; sweeps follow until k are accepted. The best one left is accepted in every sweep, so there are
    at most k sweeps. Liu et al. 2023, arXiv:2309.06657, Algorithm 1. With a pairwise ranker, r is the
    logit of its probability against a fixed completion, clipped away from 0 and 1.

    Ours: the sweeps follow a random order, since the k-th acceptance ends a sweep and would favour the
    first candidates. Of completions that are the same the first is the candidate.

    Args:
        group: With rewards; completions without a usable one are no candidates.
        k: How many to accept, >= 1; where there are no more candidates than that, all are accepted.
        beta: In units of reward, >= 0, 0.5 in the paper. At 0 the result is that of `top_k`; the larger
            it is, the less rewards matter, and at infinity the result is a uniform draw without
            replacement.
        rng: Python's own generator. Only its `random()` is called, which gives the same numbers for a
            seed in every version of Python; the result is a function of the group and these.

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
    """What a rule keeps of groups, and a count of the completions that it left out.

    Args:
        groups: Annotated, unless the rule asks for no rewards.
        rule: Keeps some of a group's completions, as the rules of this module do.

    Returns:
        The groups, and for each reason how many completions were left out: unusable where it has no
        usable reward, identical where it is the same as one that was kept, else passed over.
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
