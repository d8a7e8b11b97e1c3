"""Rewards, returns and advantages of tokens: pure functions of tensors.

A row is one completion of T tokens, and its token t is an action that the policy takes in the state before
the token. So a value V_t is that of the state before token t, and after the last token there is nothing to
come: the value of that state is 0. Masks are bool, True on tokens of the completion and False on padding
behind them. Padding may hold anything, and results are 0 there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-8
"""Added to a variance before its root is taken."""


class Divergence(NamedTuple):
    """Estimates of KL(π || π_ref) from sampled tokens, in nats per token. Each is (B, T), 0 on padding."""

    k1: Tensor
    """log π - log π_ref: right in the mean, but of either sign."""
    k3: Tensor
    """π_ref / π - 1 - log(π_ref / π): right in the mean, never negative."""


def divergence(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Divergence:
    """Estimate the KL divergence from the log-probabilities of tokens that the policy has sampled.

    Schulman 2020, "Approximating KL divergence" (his k1 and k3).

    Args:
        logps, ref_logps: under the policy that sampled the tokens and under the reference, in nats. (B, T)
        mask: tokens of the completions. bool (B, T)
    """
    k1 = torch.where(mask, logps - ref_logps, 0)
    return Divergence(k1, (-k1).exp() - 1 + k1)


def shaped_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, beta: float) -> Tensor:
    """Return the reward of each token: a penalty for its KL, and for the last token the completion's score.

    r_t = -β k1_t + [t is the last token] score

    Ziegler et al. 2019, arXiv:1909.08593; Stiennon et al. 2020, arXiv:2009.01325. The score comes at the last
    token of the row itself, whatever the length of the rows beside it.

    Args:
        scores: one number per completion. (B,)
        kl: k1 of each token under the policy that sampled it. (B, T)
        mask: tokens of the completions, at least one each. bool (B, T)
        beta: β, reward per nat.

    Returns:
        Rewards. (B, T)
    """
    rewards = torch.where(mask, -beta * kl, 0)
    return rewards.scatter_add(-1, mask.sum(-1, keepdim=True) - 1, scores[:, None].to(rewards.dtype))


def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return the sum of each token's reward and all later ones, discounted: R_t = r_t + γ R_{t+1}.

    Args:
        rewards: of each token. (B, T)
        mask: tokens of the completions. bool (B, T)
        gamma: γ in [0, 1].

    Returns:
        Returns. (B, T)
    """
    return _backwards(torch.where(mask, rewards, 0), gamma)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, Schulman et al. 2015, arXiv:1506.02438, Eq. 16.

    δ_t = r_t + γ V_{t+1} - V_t,  A_t = δ_t + γ λ A_{t+1},  R_t = A_t + V_t

    The state after the last token has the value 0, also if the completion was cut there.

    Args:
        rewards: of each token. (B, T)
        values: V_t, before each token, from the time of sampling. (B, T)
        mask: tokens of the completions. bool (B, T)
        gamma: γ in [0, 1].
        lam: λ in [0, 1]: 1 trusts the rewards alone, 0 trusts the value of the next state.

    Returns:
        Advantages A and returns R. (B, T) each
    """
    values = torch.where(mask, values, 0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = torch.where(mask, rewards + gamma * following - values, 0)
    advantages = _backwards(deltas, gamma * lam)
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Shift and scale the values of all tokens together to mean 0 and (population) variance 1.

    Call it once for all rollouts of a step, before they are split: otherwise the result depends on the split.
    Values that are all equal become 0.

    Args:
        values: of tokens. (B, T)
        mask: tokens of the completions. bool (B, T)

    Returns:
        Whitened values. (B, T)
    """
    count = mask.sum().clamp(min=1)
    exact = torch.where(mask, values, 0).double()  # rounding must not be blown up where all are equal
    centred = torch.where(mask, exact - exact.sum() / count, 0)
    variance = centred.square().sum() / count
    return (centred * (variance + EPSILON).rsqrt()).to(values.dtype)


def leave_one_out(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return each completion's reward less the mean reward of the other completions of its prompt.

    A_i = r_i - 1 / (G - 1) Σ_{j ≠ i} r_j

    RLOO, Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740, Eq. 7.

    Args:
        rewards: of G completions of each prompt. (B, G)
        mask: completions that have a reward. bool (B, G)

    Returns:
        Advantages, 0 for a completion that has no other beside it. (B, G)
    """
    known = torch.where(mask, rewards, 0)
    others = mask.sum(-1, keepdim=True) - 1
    baseline = (known.sum(-1, keepdim=True) - known) / others.clamp(min=1)
    return torch.where(mask & (others > 0), rewards - baseline, 0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """Return the share of the returns' variance that the values explain: 1 - Var(R - V) / Var(R).

    1 is a perfect value function, 0 is as good as a constant, and below 0 it is worse. None if all returns
    are equal.

    Args:
        values, returns: of tokens. (B, T)
        mask: tokens of the completions. bool (B, T)
    """
    total = returns[mask].double().var(correction=0)
    rest = (returns - values)[mask].double().var(correction=0)
    return float(1 - rest / total) if total > 0 else None


def adapted_beta(beta: float, kl: float, *, target: float, horizon: float, count: int) -> float:
    """Return the next β of a controller that steers the KL to a target.

    β ← β (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)

    Ziegler et al. 2019, arXiv:1909.08593, Sec. 2.2.

    Args:
        beta: β of the step that was done.
        kl: its KL in nats per completion.
        target: nats per completion.
        horizon: completions over which β can change by about a fifth.
        count: n, completions of the step.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * count / horizon)


def _backwards(values: Tensor, factor: float) -> Tensor:
    """Return x with x_t = values_t + factor x_{t+1}, from the last column on. (B, T)"""
    result = torch.zeros_like(values)
    later = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        later = values[:, t] + factor * later
        result[:, t] = later
    return result
