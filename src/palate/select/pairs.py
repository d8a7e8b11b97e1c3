"""How a group of annotated completions becomes pairs to learn from, or is dropped with a reason.

A pair that says nothing, or whose order rests on nothing, is never trained on: it is dropped and
counted. Rules are functions of one group; `select_pairs` applies one to many groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Literal, NamedTuple

from palate.select._group import check_tie, name, same, take, usable
from palate.types import Group, Pair


class Drop(StrEnum):
    """Why a group gave no pair, or why a pair or a completion was left out."""

    TIE = "tie"
    """The rewards of best and worst lie too close together."""
    IDENTICAL = "identical"
    """Best and worst are the same text, whatever their rewards; or a completion repeats one that is kept."""
    UNUSABLE = "unusable"
    """Fewer than two completions have a usable reward; or this completion has none."""
    PASSED_OVER = "passed_over"
    """Nothing is wrong with it, but the rule took others, or found no partner for it."""


class Selected(NamedTuple):
    """What a rule made of many groups: the pairs in order, and how often it dropped something, by reason.

    What is counted is what the rule looks at: groups for a rule that makes one pair of a group, possible
    pairs, matches or completions for the others.
    """

    pairs: tuple[Pair, ...]
    dropped: Mapping[Drop, int]
    """Has every reason, with 0 where nothing was dropped for it."""


Rule = Callable[[Group], Pair | Drop | Selected]
"""Makes a pair of an annotated group, or says why there is none; or makes several and counts what it left."""


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
    check_tie(tie)
    rewards = usable(group)
    if len(rewards) < 2:
        return Drop.UNUSABLE
    best = max(rewards, key=rewards.__getitem__)  # the first of equals
    chosen, low = group.completions[best], min(rewards.values())
    lowest = [group.completions[i] for i, r in rewards.items() if r == low]
    rejected = next((other for other in lowest if not same(other, chosen)), None)
    if rejected is None:
        return Drop.IDENTICAL
    margin = rewards[best] - low
    return Pair(group.prompt, chosen, rejected, margin) if margin > tie else Drop.TIE


def pair_of_two(group: Group, *, tie: float = 0.0) -> Pair | Drop:
    """The better of exactly two completions against the other: `best_vs_worst` where nothing is left out."""
    if len(group.completions) != 2:
        raise ValueError(f"{name(group)} has {len(group.completions)} completions, expected 2")
    return best_vs_worst(group, tie=tie)


def all_pairs(group: Group, *, tie: float = 0.0) -> Selected:
    """Each completion against each other, the better one chosen.

    A reward model is trained on all pairs of a ranking (Ouyang et al. 2022, arXiv:2203.02155).
    Completions that are the same make no pair with each other, but each makes its own with a third;
    who wants that pair once passes `distinct(group)`.

    Args:
        group: With rewards; n completions.
        tie: Largest difference of reward that still counts as a tie, >= 0.

    Returns:
        The pairs in order of their completions in the group, and a count of those left out: together
        n (n - 1) / 2.
    """
    n = len(group.completions)
    twos = [take(group, (i, j)) for i in range(n) for j in range(i + 1, n)]
    return select_pairs(twos, lambda two: pair_of_two(two, tie=tie))


def by_likelihood_rank(
    group: Group,
    *,
    threshold: float,
    logps: Sequence[float] | None = None,
    direction: Literal["above", "below", "either"] = "above",
    partner: Literal["nearest", "farthest", "all"] = "nearest",
) -> Selected:
    """Each positive completion against a negative one near it in the model's ranking by likelihood.

    After CLICK (Zheng et al. 2023, arXiv:2306.03350), which forms its pairs by the likelihood rank of
    positive and negative samples. The paper's exact rule has not been verified; ours is a choice: a
    positive is paired with the negative just above it, so that all pairs are ones which the model has
    in the wrong order, and by the least that is to be put right. A positive with no negative above it
    gives no pair. `direction` and `partner` make the other rules. Of equally near ones the first in
    the group is taken; one of the same likelihood as the positive is near it on either side, but
    neither above nor below it.

    Args:
        group: With rewards.
        threshold: Completions of a reward above it are the positive ones, of any other reward the
            negative ones.
        logps: Log-probability of each completion under the model to be trained, summed over its tokens,
            in nats; of the completions' own `logps`, those at sampling, if not given.
        direction: Where a positive's partner is looked for: among the negatives likelier than itself,
            among those less likely, or among all.
        partner: Which one is taken, by difference of log-probability, or whether all are.

    Returns:
        The pairs in order of their positives; and a count of the completions that have no usable reward,
        of the positives that found no partner, and of those that found none but repetitions of themselves.
    """
    rewards, ranks = usable(group), _likelihoods(group, logps)
    pairs: list[Pair] = []
    dropped = _no_drops()
    dropped[Drop.UNUSABLE] = len(group.completions) - len(rewards)
    for i in (i for i, r in rewards.items() if r > threshold):
        gaps = {j: ranks[j] - ranks[i] for j, r in rewards.items() if r <= threshold}
        if direction != "either":
            gaps = {j: gap for j, gap in gaps.items() if (gap > 0 if direction == "above" else gap < 0)}
        others = [j for j in gaps if not same(group.completions[i], group.completions[j])]
        if not others:
            dropped[Drop.IDENTICAL if gaps else Drop.PASSED_OVER] += 1
            continue
        if partner != "all":
            pick = min if partner == "nearest" else max
            others = [pick(others, key=lambda j: abs(gaps[j]))]
        pairs += [
            Pair(group.prompt, group.completions[i], group.completions[j], rewards[i] - rewards[j])
            for j in others
        ]
    return Selected(tuple(pairs), dropped)


def select_pairs(groups: Iterable[Group], rule: Rule) -> Selected:
    """The pairs that a rule makes of annotated groups, and a count of what it dropped."""
    pairs: list[Pair] = []
    dropped = _no_drops()
    for group in groups:
        usable(group)  # raises even if the rule would not look
        made = rule(group)
        if isinstance(made, Pair):
            pairs.append(made)
        elif isinstance(made, Selected):
            pairs.extend(made.pairs)
            for reason, count in made.dropped.items():
                dropped[reason] += count
        else:
            dropped[made] += 1
    return Selected(tuple(pairs), dropped)


def _no_drops() -> dict[Drop, int]:
    return dict.fromkeys(Drop, 0)


def _likelihoods(group: Group, logps: Sequence[float] | None) -> Sequence[float]:
    """Log-probability of each completion, given or from its sampling."""
    if logps is None:
        if any(completion.logps is None for completion in group.completions):
            raise ValueError(f"{name(group)} has completions without log-probabilities: pass logps")
        logps = [sum(completion.logps or ()) for completion in group.completions]
    if len(logps) != len(group.completions):
        raise ValueError(
            f"{len(logps)} logps were given for {len(group.completions)} completions of {name(group)}, "
            f"expected one each"
        )
    if not all(math.isfinite(logp) for logp in logps):
        raise ValueError(f"a log-probability of {name(group)} is not finite: {list(logps)}")
    return logps
