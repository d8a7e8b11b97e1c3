"""Losses on a group of completions of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.losses._checks import check_mask, check_shapes


def rrhf(mean_logps: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ranking of a group: no completion is to be likelier per token than one of higher reward.

    L = Σ over i, j with r_i < r_j of max(0, p_i - p_j)

    The rank term of RRHF, Yuan et al. 2023, arXiv:2304.05302; the other term, to which it is added with
    weight 1, is `nll` of the completion of highest reward. Only the order of the rewards counts, and
    completions of equal reward make no term. There is no margin: at the kink, p_i = p_j, the gradient
    is 0.

    Args:
        mean_logps: p, log-probability per token of each completion under the policy: the sum over its
            tokens divided by their number, in nats. (B, G)
        rewards: r, higher is better, in a number format that tells them apart (float64). One that is not
            finite stands for no usable reward, and its completion takes no part. (B, G)
        mask: Bool, False where a smaller group is padded, whatever stands there. (B, G)

    Returns:
        Loss per group, in nats per token, summed over its pairs, of which there are up to G (G - 1) / 2;
        0 where fewer than two completions take part. (B,)
    """
    check_shapes("BG", mean_logps=mean_logps, rewards=rewards)
    counts = rewards.isfinite()
    if mask is not None:
        check_shapes("BG", mean_logps=mean_logps, mask=mask)
        check_mask(mask=mask)
        counts = counts & mask
    logps = torch.where(counts, mean_logps, 0)  # what is left out may be NaN, and zero times NaN is NaN
    worse = rewards.unsqueeze(-1) < rewards.unsqueeze(-2)
    worse = worse & counts.unsqueeze(-1) & counts.unsqueeze(-2)
    gaps = logps.unsqueeze(-1) - logps.unsqueeze(-2)
    return (torch.relu(gaps) * worse).sum((-2, -1))
