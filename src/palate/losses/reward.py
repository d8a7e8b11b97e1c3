"""Loss of a reward model on a pair of completions."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_shapes


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
    elif not 0 <= margin < float("inf"):
        raise ValueError(f"margin is {margin}, expected a finite number, 0 or above")
    return -F.logsigmoid(chosen_rewards - rejected_rewards - margin)
