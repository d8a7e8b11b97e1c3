"""Golden values by hand, loops, and what padding must not change.

Row A has three tokens and ended, with the score 1. Row B has four tokens and was cut: score 0.4 less a
penalty of 1. β = 0.1, γ = 1.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from palate.advantages import (
    adapted_beta,
    discounted_returns,
    divergence,
    explained_variance,
    gae,
    leave_one_out,
    shaped_rewards,
    whiten,
)
from palate.losses import ppo_clip, ppo_clipped, value_clip

NAN = float("nan")


def rows(a: list[float], b: list[float]) -> Tensor:
    return torch.tensor([[*a, NAN], b], dtype=torch.float64)


MASK = torch.tensor([[True, True, True, False], [True] * 4])
LOGPS = rows([-1.2, -0.7, -0.1], [-2.0, -0.4, -1.5, -0.9])
REF = rows([-1.0, -1.1, -0.3], [-2.3, -0.4, -1.1, -1.4])
VALUES = rows([0.3, 0.5, 0.9], [0.1, -0.2, 0.0, 0.4])
SCORES = torch.tensor([1.0, -0.6], dtype=torch.float64)
KL = divergence(LOGPS, REF, MASK)
REWARDS = shaped_rewards(SCORES, KL.k1, MASK, beta=0.1)


def equals(tensor: Tensor, a: list[float], b: list[float]) -> None:
    assert_close(tensor[0], torch.tensor([*a, 0.0], dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(tensor[1], torch.tensor(b, dtype=torch.float64), atol=1e-6, rtol=0)


def test_divergence() -> None:
    equals(KL.k1, [-0.2, 0.4, 0.2], [0.3, 0.0, -0.4, 0.5])
    equals(KL.k3, [0.021403, 0.070320, 0.018731], [0.040818, 0.0, 0.091825, 0.106531])


def test_the_score_comes_at_the_last_token_of_each_row() -> None:
    equals(REWARDS, [0.02, -0.04, 0.98], [-0.03, 0.0, 0.04, -0.65])


@pytest.mark.parametrize(
    ("lam", "a", "b"),
    [
        (0.95, [0.634200, 0.436000, 0.080000], [-0.643144, -0.329625, -0.557500, -1.05]),
        (1.0, [0.66, 0.44, 0.08], [-0.74, -0.41, -0.61, -1.05]),
        (0.0, [0.22, 0.36, 0.08], [-0.33, 0.20, 0.44, -1.05]),
    ],
)
def test_gae(lam: float, a: list[float], b: list[float]) -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK, lam=lam)
    equals(advantages, a, b)
    assert_close(returns, torch.where(MASK, advantages + VALUES, 0))


def test_whitening_is_of_all_tokens_and_no_padding() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK)
    whitened = whiten(advantages, MASK)
    equals(whitened, [1.481557, 1.131353, 0.502328], [-0.775411, -0.221447, -0.624085, -1.494294])
    assert float(whitened[MASK].mean()) == pytest.approx(0, abs=1e-12)
    assert float(whitened[MASK].var(correction=0)) == pytest.approx(1, abs=1e-6)
    assert explained_variance(VALUES, returns, MASK) == pytest.approx(0.435462, abs=1e-6)
    assert explained_variance(VALUES, gae(REWARDS, VALUES, MASK, lam=1)[1], MASK) == pytest.approx(
        0.434024, abs=1e-6
    )


def test_equal_values_whiten_to_nothing() -> None:
    assert whiten(torch.full((2, 4), 0.7), MASK).abs().max() < 1e-9
    assert whiten(torch.full((1, 1), 3.0), torch.tensor([[True]])).item() == 0
    assert explained_variance(torch.zeros(2, 4), torch.ones(2, 4), MASK) is None


def test_an_update_step() -> None:
    advantages, returns = gae(REWARDS, VALUES, MASK)
    whitened = whiten(advantages, MASK)
    new = rows([-1.0, -0.7, -0.15], [-2.3, -0.35, -1.5, -0.6]).requires_grad_()
    loss = ppo_clip(new, LOGPS, whitened, MASK)
    equals(loss.detach(), [-1.777868, -1.131353, -0.477829], [0.620329, 0.232801, 0.624085, 2.017086])
    (slope,) = torch.autograd.grad(loss.sum(), new)
    equals(slope, [0, -1.131353, -0.477829], [0, 0.232801, 0.624085, 2.017086])
    assert float(loss.detach().sum() / MASK.sum()) == pytest.approx(
        0.015322, abs=1e-6
    )  # row means would be negative
    assert int(ppo_clipped(new, LOGPS, whitened, MASK).sum()) == 2
    values = rows([0.5, 0.4, 0.9], [0.0, -0.2, -0.3, 0.2])
    loss = value_clip(values, VALUES, returns, MASK)
    equals(loss, [0.094265, 0.143648, 0.003200], [0.147503, 0.054326, 0.063903, 0.361250])
    plain = value_clip(values, VALUES, returns, MASK, clip=None)
    assert float(loss.sum() / 7) == pytest.approx(0.124014, abs=1e-6)
    assert float(plain.sum() / 7) == pytest.approx(0.119621, abs=1e-6)


def looped(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_l (γ λ)^l δ_{t+l}, term by term."""
    deltas = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t]
        for t in range(len(values))
    ]
    return [sum((gamma * lam) ** i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(values))]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_against_loops_and_beside_other_rows(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 4, 2]
    rewards, values = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7)[None] < torch.tensor(lengths)[:, None]
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    sums = discounted_returns(rewards, mask, gamma=gamma)
    for i, n in enumerate(lengths):
        own = rewards[i, :n].tolist()
        assert advantages[i, :n].tolist() == pytest.approx(looped(own, values[i, :n].tolist(), gamma, lam))
        assert sums[i, :n].tolist() == pytest.approx(
            [math.fsum(gamma**k * r for k, r in enumerate(own[t:])) for t in range(n)]
        )
        # Alone, a row has the same numbers to the last bit as beside longer ones.
        alone = gae(rewards[i : i + 1, :n], values[i : i + 1, :n], mask[i : i + 1, :n], gamma=gamma, lam=lam)
        assert torch.equal(alone[0][0], advantages[i, :n])
        assert torch.equal(alone[1][0], returns[i, :n])
        assert advantages[i, n:].abs().sum() == 0


def test_a_hundred_columns_of_padding_change_nothing() -> None:
    def wider(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 100), value=NAN)

    mask = torch.nn.functional.pad(MASK, (0, 100))
    kl = divergence(wider(LOGPS), wider(REF), mask)
    rewards = shaped_rewards(SCORES, kl.k1, mask, beta=0.1)
    advantages, returns = gae(rewards, wider(VALUES), mask)
    narrow, narrow_returns = gae(REWARDS, VALUES, MASK)
    assert torch.equal(advantages[:, :4], narrow)
    assert torch.equal(returns[:, :4], narrow_returns)
    assert_close(whiten(advantages, mask)[:, :4], whiten(narrow, MASK))
    assert float(kl.k3.sum()) == pytest.approx(float(KL.k3.sum()))
    assert explained_variance(wider(VALUES), returns, mask) == explained_variance(
        VALUES, narrow_returns, MASK
    )


def test_leave_one_out() -> None:
    # 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2; then two of three; then one alone.
    rewards = torch.tensor([[1.0, 2.0, 6.0], [1.0, NAN, 5.0], [3.0, NAN, NAN]])
    advantages = leave_one_out(rewards, ~rewards.isnan())
    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [-4.0, 0.0, 4.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("kl", "beta"), [(3, 0.197952), (6, 0.2), (6.6, 0.201024), (12, 0.202048)])
def test_adaptive_kl(kl: float, beta: float) -> None:
    assert adapted_beta(0.2, kl, target=6, horizon=10_000, count=512) == pytest.approx(beta, abs=1e-9)
