"""Losses on a group of completions of one prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from palate.losses._checks import check_mask, check_shapes


def rrhf(mean_logps: Tensor, rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the ranking loss of groups: completions must not be likelier per token than better ones.

    L = Σ over i, j with r_i < r_j of max(0, p_i - p_j)

    The rank term of RRHF, Yuan et al. 2023, arXiv:2304.05302. RRHF adds it with weight 1 to the `nll` of the
    completion with the highest reward. Only the order of the rewards matters, and completions with equal
    rewards add no term. It has no margin: at the kink, p_i = p_j, the gradient is 0.

    Args:
        mean_logps: p, log-probability per token of each completion under the policy: the sum over its
            tokens divided by their number, in nats. (B, G)
        rewards: r, higher is better, in a number format with enough precision
            to distinguish them (float64). A value that is not finite means no usable reward, and its
            completion is ignored. (B, G)
        mask: Bool, False for padding of smaller groups, where values are ignored. (B, G)

    Returns:
        Loss per group, in nats per token, summed over up to G (G - 1) / 2 pairs; 0 with fewer than two
        usable completions. (B,)
    """
    check_shapes("BG", mean_logps=mean_logps, rewards=rewards)
    counts = rewards.isfinite()
    if mask is not None:
        check_shapes("BG", mean_logps=mean_logps, mask=mask)
        check_mask(mask=mask)
        counts = counts & mask
    logps = torch.where(counts, mean_logps, 0)  # ignored values may be NaN, and zero times NaN is NaN
    worse = rewards.unsqueeze(-1) < rewards.unsqueeze(-2)
    worse = worse & counts.unsqueeze(-1) & counts.unsqueeze(-2)
    gaps = logps.unsqueeze(-1) - logps.unsqueeze(-2)
    return (torch.relu(gaps) * worse).sum((-2, -1))
