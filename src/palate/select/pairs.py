"""Rules that turn a group of annotated completions into pairs to learn from, or drop it with a reason.

A pair without information, such as a tie or two equal texts, is never trained on: it is dropped and
counted. Rules are functions of one group; `select_pairs` applies a rule to many groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Literal, NamedTuple

from palate.select._group import check_tie, name, same, take, usable
from palate.types import Group, Pair


class Drop(StrEnum):
    """The reason why a group has no pair, or why a pair or a completion is dropped."""

    TIE = "tie"
    """The rewards of best and worst differ by no more than the tie."""
    IDENTICAL = "identical"
    """Best and worst are the same text, even if their rewards differ; or a completion repeats a kept one."""
    UNUSABLE = "unusable"
    """Fewer than two completions have a usable reward; or the completion has no usable reward."""
    PASSED_OVER = "passed_over"
    """The item is valid, but the rule preferred others or had no partner for it."""


class Selected(NamedTuple):
    """The result of a rule on many groups: the pairs in order, and the number of dropped items by reason.

    The items depend on the rule: groups for a rule with one pair per group; possible pairs, matches or
    completions for other rules.
    """

    pairs: tuple[Pair, ...]
    dropped: Mapping[Drop, int]
    """The count of every reason, including zeros."""


Rule = Callable[[Group], Pair | Drop | Selected]
"""Returns the pair of an annotated group, or the reason for having none; or several pairs and drop counts."""


def best_vs_worst(group: Group, *, tie: float = 0.0) -> Pair | Drop:
    """Return the pair of the completions with the highest and the lowest reward.

    If several have the highest reward, the first is chosen; if several have the lowest, the first with a
    different text is rejected. Completions with a reward that is None, infinite or NaN are ignored. If best
    and worst are the same text, the group is dropped as identical even if the rewards differ, which happens
    with a noisy judge.

    Args:
        group: A group with rewards.
        tie: Largest reward difference that counts as a tie, >= 0.

    Returns:
        The pair, with the reward difference (> tie) as margin; or the reason for having no pair.
    """
    check_tie(tie)
    rewards = usable(group)
    if len(rewards) < 2:
        return Drop.UNUSABLE
    best = max(rewards, key=rewards.__getitem__)  # the first, if several are equal
    chosen, low = group.completions[best], min(rewards.values())
    lowest = [group.completions[i] for i, r in rewards.items() if r == low]
    rejected = next((other for other in lowest if not same(other, chosen)), None)
    if rejected is None:
        return Drop.IDENTICAL
    margin = rewards[best] - low
    return Pair(group.prompt, chosen, rejected, margin) if margin > tie else Drop.TIE


def pair_of_two(group: Group, *, tie: float = 0.0) -> Pair | Drop:
    """Return the pair of a group of exactly two completions, by `best_vs_worst`."""
    if len(group.completions) != 2:
        raise ValueError(f"{name(group)} has {len(group.completions)} completions, expected 2")
    return best_vs_worst(group, tie=tie)


def all_pairs(group: Group, *, tie: float = 0.0) -> Selected:
    """Return all pairs of a group's completions, the better one chosen.

    Ouyang et al. 2022, arXiv:2203.02155, train a reward model on all pairs of a ranking. Two equal
    completions form no pair with each other, but each forms its own pair with a third; pass
    `distinct(group)` to have such pairs only once.

    Args:
        group: A group of n completions with rewards.
        tie: Largest reward difference that counts as a tie, >= 0.

    Returns:
        The pairs in order of their completions in the group, and the number of dropped pairs; the sum is
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
    """Pair each positive completion with a negative one near it in the model's ranking by likelihood.

    After CLICK (Zheng et al. 2023, arXiv:2306.03350), which forms pairs by the likelihood rank of positive
    and negative samples. The paper's exact rule has not been verified. By default, a positive is paired with
    the nearest negative that is likelier: all pairs are in the wrong order for the model, and their
    correction is the smallest possible. A positive without a likelier negative forms no pair. `direction`
    and `partner` select other rules. If several negatives are equally near, the first in the group is used.
    A negative with the same likelihood as the positive is neither above nor below it.

    Args:
        group: A group with rewards.
        threshold: Completions with a reward above this are positive, all other rewards are negative.
        logps: Log-probability of each completion under the model to train, summed over its tokens, in
            nats; default: the completions' own `logps`, from sampling.
        direction: Candidates for partners: the negatives likelier than the positive, those less likely, or
            all.
        partner: Choice among them, by the difference of log-probability: one of them, or all.

    Returns:
        The pairs in order of their positives; and the numbers of completions without a usable reward, of
        positives without a partner, and of positives whose only partners repeat them.
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
    """Apply a rule to annotated groups; return the pairs and the number of dropped items by reason."""
    pairs: list[Pair] = []
    dropped = _no_drops()
    for group in groups:
        usable(group)  # raises an error for missing rewards, even if the rule reads none
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
    """Return the log-probability of each completion: `logps`, or those from sampling. (G,)"""
    if logps is None:
        if any(completion.logps is None for completion in group.completions):
            raise ValueError(f"{name(group)} has completions without log-probabilities: pass logps")
        logps = [sum(completion.logps or ()) for completion in group.completions]
    if len(logps) != len(group.completions):
        raise ValueError(
            f"{len(logps)} logps were given for {len(group.completions)} completions of {name(group)}, "
            f"expected one per completion"
        )
    if not all(math.isfinite(logp) for logp in logps):
        raise ValueError(f"a log-probability of {name(group)} is not finite: {list(logps)}")
    return logps
