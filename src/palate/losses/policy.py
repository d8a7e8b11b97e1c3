"""Losses of policy gradients, one number per token: of the policy, and of the value function beside it.

Rows are completions of unequal length, so every function takes a mask, and its numbers are 0 where the mask
is False, whatever stands there. The caller sums over tokens and divides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palate.losses._checks import check_mask, check_positive, check_shapes


def ppo_clip(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> Tensor:
    """Clipped surrogate: raise the probability of tokens with an advantage, within bounds.

    L = max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)),  ρ = π(token) / π_old(token)

    Proximal policy optimisation, Schulman et al. 2017, arXiv:1707.06347, Eq. 7, with the opposite sign.
    Beyond the bound in the direction that the advantage asks for, the gradient is 0. It is not 0 beyond the
    other bound, so that a token that moved the wrong way comes back.

    Args:
        logps: Log-probability of each token under the policy, in nats. (B, T)
        old_logps: The same under the policy that sampled the tokens, without gradient. (B, T)
        advantages: A, without gradient. (B, T)
        mask: Bool, True on tokens of the completion. (B, T)
        clip: ε > 0.

    Returns:
        Loss per token, -A where π = π_old. (B, T)
    """
    check_shapes("BT", logps=logps, old_logps=old_logps, advantages=advantages, mask=mask)
    check_mask(mask=mask)
    check_positive(clip=clip)
    ratio = _ratio(logps, old_logps, mask)
    weights = torch.where(mask, advantages, 0)
    return torch.maximum(-weights * ratio, -weights * ratio.clamp(1 - clip, 1 + clip))


def ppo_clipped(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, *, clip: float = 0.2
) -> Tensor:
    """Return True on the tokens whose clipped term is the larger one, where `ppo_clip` has no gradient.

    Args:
        logps, old_logps, advantages, mask, clip: as in `ppo_clip`. (B, T)

    Returns:
        Bool. (B, T)
    """
    ratio = _ratio(logps, old_logps, mask)
    weights = torch.where(mask, advantages, 0)
    return -weights * ratio.clamp(1 - clip, 1 + clip) > -weights * ratio


def value_clip(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float | None = 0.2
) -> Tensor:
    """Squared error of the value function, pessimistic about values that left their old place.

    L = ½ max((V - R)², (V_old + clip(V - V_old, -ε, ε) - R)²)

    From the code of Schulman et al. 2017, arXiv:1707.06347, and of Stiennon et al. 2020, arXiv:2009.01325;
    the papers do not write it down. Where V is more than ε from V_old on the side of R, the gradient is 0.

    Args:
        values: V, value of the state before each token. (B, T)
        old_values: V_old, the same when the tokens were sampled, without gradient. (B, T)
        returns: R, without gradient. (B, T)
        mask: Bool, True on tokens of the completion. (B, T)
        clip: ε > 0 in units of the reward; None for the plain squared error ½ (V - R)².

    Returns:
        Loss per token, 0 where V = V_old = R. (B, T)
    """
    check_shapes("BT", values=values, old_values=old_values, returns=returns, mask=mask)
    check_mask(mask=mask)
    error = _or_zero(mask, values - returns).square()
    if clip is None:
        return 0.5 * error
    check_positive(clip=clip)
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, _or_zero(mask, near - returns).square())


def reinforce(logps: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Policy gradient: raise the log-probability of each token in proportion to its advantage.

    L = -A log π(token)

    Williams 1992 (doi:10.1007/BF00992696). It is right for tokens that the policy as it is has sampled; its
    gradient is that of `ppo_clip` where π = π_old.

    Args:
        logps: Log-probability of each token under the policy, in nats. (B, T)
        advantages: A, return less baseline, without gradient. (B, T)
        mask: Bool, True on tokens of the completion. (B, T)

    Returns:
        Loss per token. (B, T)
    """
    check_shapes("BT", logps=logps, advantages=advantages, mask=mask)
    check_mask(mask=mask)
    return -torch.where(mask, advantages, 0) * _or_zero(mask, logps)


def _ratio(logps: Tensor, old_logps: Tensor, mask: Tensor) -> Tensor:
    return _or_zero(mask, logps - old_logps).exp()


def _or_zero(mask: Tensor, values: Tensor) -> Tensor:
    """Values where the mask is True; elsewhere 0, since zero times NaN would be NaN."""
    return torch.where(mask, values, 0)
