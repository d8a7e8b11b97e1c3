"""Losses of a reward model on a pair of completions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_not_negative, check_probabilities, check_shapes


def bradley_terry(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: float | Tensor = 0.0
) -> Tensor:
    """Negative log-likelihood of the preference when the odds of winning are e to the reward difference.

    L = -log σ(r(chosen) - r(rejected) - m)

    Bradley & Terry 1952; on reward models of language Ouyang et al. 2022, arXiv:2203.02155, with m = 0;
    the margin, wider for pairs that labellers found further apart, is Llama 2's (Touvron et al. 2023,
    arXiv:2307.09288). Only the difference counts: rewards are learnt up to a constant per prompt.

    Args:
        chosen_rewards: What the model's scalar head gives the chosen completion. (B,)
        rejected_rewards: The same for the rejected completion. (B,)
        margin: How far the rewards are to differ, in units of reward: one number >= 0 for all pairs, or
            one per pair, (B,), which is taken as it is. For a large margin the loss is linear in the
            difference and no pair is ever learnt.

    Returns:
        Loss per pair, log 2 where the difference equals the margin. (B,)
    """
    check_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if isinstance(margin, Tensor):
        check_shapes("B", chosen_rewards=chosen_rewards, margin=margin)
    else:
        check_not_negative(margin=margin)
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def soft_preference(reward_a: Tensor, reward_b: Tensor, p: Tensor) -> Tensor:
    """Cross-entropy between a labeller's probability of preference and that of the rewards.

    L = -p log σ(r(a) - r(b)) - (1 - p) log σ(r(b) - r(a))

    RLAIF, Lee et al. 2023, arXiv:2309.00267, where p is a labeller model's probability, averaged over
    both orders of the two completions. With p = 1 it is `bradley_terry`. It is least, at the entropy
    of p, where the difference of reward is log(p / (1 - p)): a doubtful label asks for a small
    difference, where a hard one asks for ever more.

    Args:
        reward_a: What the model's scalar head gives the first completion. (B,)
        reward_b: The same for the second. (B,)
        p: Probability that the first is the preferred one, in [0, 1]. (B,)

    Returns:
        Loss per pair, log 2 where the rewards are equal, whatever p is. (B,)
    """
    check_shapes("B", reward_a=reward_a, reward_b=reward_b, p=p)
    check_probabilities(p=p)
    difference = reward_a - reward_b
    return -p * F.logsigmoid(difference) - (1 - p) * F.logsigmoid(-difference)
