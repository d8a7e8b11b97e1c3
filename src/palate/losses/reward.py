"""Losses of a reward model on a pair of completions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_not_negative, check_probabilities, check_shapes


def bradley_terry(
    chosen_rewards: Tensor, rejected_rewards: Tensor, *, margin: float | Tensor = 0.0
) -> Tensor:
    """Return the negative log-likelihood of preferences whose log-odds are the reward difference.

    L = -log σ(r(chosen) - r(rejected) - m)

    Bradley & Terry 1952; for reward models of language, Ouyang et al. 2022, arXiv:2203.02155, with m = 0.
    The margin, larger for clearer preferences, is from Llama 2 (Touvron et al. 2023, arXiv:2307.09288). Only
    the difference matters: rewards are learnt up to a constant per prompt.

    Args:
        chosen_rewards: Reward of the chosen completion, from the model's scalar head. (B,)
        rejected_rewards: The same for the rejected completion. (B,)
        margin: Required difference of the rewards: one number >= 0 for all pairs, or one per pair, (B,),
            which is not checked. For a large margin the loss is linear in the difference and never becomes
            small.

    Returns:
        Loss per pair, log 2 if the difference equals the margin. (B,)
    """
    check_shapes("B", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    if isinstance(margin, Tensor):
        check_shapes("B", chosen_rewards=chosen_rewards, margin=margin)
    else:
        check_not_negative(margin=margin)
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)


def soft_preference(reward_a: Tensor, reward_b: Tensor, p: Tensor) -> Tensor:
    """Return the cross-entropy of the rewards' preference probability with a labeller's probability.

    L = -p log σ(r(a) - r(b)) - (1 - p) log σ(r(b) - r(a))

    RLAIF, Lee et al. 2023, arXiv:2309.00267; p is the probability from a labeller model, averaged over both
    orders of the two completions. With p = 1 the loss is `bradley_terry`. Its minimum, the entropy of p, is
    at the reward difference log(p / (1 - p)): an uncertain label has a small target difference, a hard label
    an infinite one.

    Args:
        reward_a: Reward of the first completion, from the model's scalar head. (B,)
        reward_b: The same for the second completion. (B,)
        p: Probability that the first completion is preferred, in [0, 1]. (B,)

    Returns:
        Loss per pair, log 2 if the rewards are equal, for any p. (B,)
    """
    check_shapes("B", reward_a=reward_a, reward_b=reward_b, p=p)
    check_probabilities(p=p)
    difference = reward_a - reward_b
    return -p * F.logsigmoid(difference) - (1 - p) * F.logsigmoid(-difference)
