"""Best against worst without a preference for length: the shortest good and the longest bad completion."""

from __future__ import annotations

from palate.select._group import check_tie, same, usable
from palate.select.pairs import Drop
from palate.types import Group, Pair


def tiered(group: Group, *, width: float, tie: float = 0.0) -> Pair | Drop:
    """Return the pair of the shortest completion of the top tier and the longest of the bottom tier.

    Wu et al. 2024 (Meta-Rewarding, arXiv:2407.19594): with the highest reward a and the lowest b, the top
    tier has the rewards from (1 - width) a + width b up to a. Ours: the bottom tier mirrors it, and no
    completion is in both tiers. Lengths are in tokens; of equal lengths, the better reward is chosen and the
    worse is rejected.

    Args:
        group: a group with rewards.
        width: share of the range of rewards that each tier has, in [0, 0.5). With 0, only equal rewards are
            in one tier.
        tie: largest difference of a and b that counts as a tie, >= 0.

    Returns:
        The pair, with the difference of its two rewards as margin; or the reason for having no pair.
    """
    if not 0 <= width < 0.5:
        raise ValueError(f"width is {width}, expected 0 <= width < 0.5, so that the tiers do not overlap")
    check_tie(tie)
    rewards = usable(group)
    if len(rewards) < 2:
        return Drop.UNUSABLE
    best, worst = max(rewards.values()), min(rewards.values())
    if best - worst <= tie:
        texts = [group.completions[i] for i in rewards]
        return Drop.IDENTICAL if all(same(texts[0], text) for text in texts) else Drop.TIE
    reach = width * (best - worst)
    length = {i: len(group.completions[i].token_ids) for i in rewards}
    top = [i for i, reward in rewards.items() if reward >= best - reach]
    bottom = [i for i, reward in rewards.items() if reward <= worst + reach]
    chosen = min(top, key=lambda i: (length[i], -rewards[i]))
    others = [i for i in bottom if not same(group.completions[i], group.completions[chosen])]
    if not others:
        return Drop.IDENTICAL
    rejected = max(others, key=lambda i: (length[i], -rewards[i]))
    margin = rewards[chosen] - rewards[rejected]
    return Pair(group.prompt, group.completions[chosen], group.completions[rejected], margin)
