from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from palate.losses import ppo_clip, ppo_clipped, reinforce, value_clip

NAN = float("nan")


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


ON = torch.tensor([[True]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # loss = max(-A ρ, -A clip(ρ, .8, 1.2)); dL/dlogp = -A ρ where the first term is larger, else 0
        (1.5, 1.0, -1.2, 0.0),  # as far up as it may go
        (0.6, 1.0, -0.6, -0.6),  # moved the wrong way: comes back
        (1.5, -1.0, 1.5, 1.5),
        (0.6, -1.0, 0.8, 0.0),
        (5.0, -1.0, 5.0, 5.0),  # no bound on this side
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),  # within the bounds
    ],
)
def test_ppo_clip(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = row(ratio).log().requires_grad_()
    value = ppo_clip(logps, row(0.0), row(advantage), ON, clip=0.2)
    (gradient,) = torch.autograd.grad(value.sum(), logps)
    assert_close(value, row(loss))
    assert_close(gradient, row(slope))
    clipped = ppo_clipped(logps, row(0.0), row(advantage), ON, clip=0.2)
    assert bool(clipped) == (slope == 0.0)


def test_ppo_clip_on_both_sides_of_the_bound() -> None:
    # With A = 1 the gradient is -ρ up to 1.2 and 0 from there on.
    for ratio, slope in ((1.2 - 1e-9, -1.2), (1.2 + 1e-9, 0.0)):
        logps = row(ratio).log().requires_grad_()
        (gradient,) = torch.autograd.grad(ppo_clip(logps, row(0.0), row(1.0), ON).sum(), logps)
        assert_close(gradient, row(slope))


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        # ½ max((V - R)², (clip(V, V_old ± .2) - R)²), by hand
        (0.9, 0.5, 1.0, 0.045, 0.0),
        (0.6, 0.5, 1.0, 0.08, -0.4),
        (0.9, 0.5, 0.4, 0.125, 0.5),
        (0.1, 0.5, 1.0, 0.405, -0.9),
        (0.1, 0.5, 0.0, 0.045, 0.0),
    ],
)
def test_value_clip(value: float, old: float, target: float, loss: float, slope: float) -> None:
    values = row(value).requires_grad_()
    made = value_clip(values, row(old), row(target), ON, clip=0.2)
    (gradient,) = torch.autograd.grad(made.sum(), values)
    assert_close(made, row(loss))
    assert_close(gradient, row(slope))
    plain = value_clip(values, row(old), row(target), ON, clip=None)
    assert_close(plain, row(0.5 * (value - target) ** 2))


def test_reinforce_has_the_gradient_of_ppo_before_the_first_update() -> None:
    generator = torch.Generator().manual_seed(0)
    logps, advantages = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 1, 3])[:, None]
    logps.requires_grad_()
    (one,) = torch.autograd.grad(reinforce(logps, advantages, mask).sum(), logps)
    (other,) = torch.autograd.grad(ppo_clip(logps, logps.detach(), advantages, mask).sum(), logps)
    assert_close(one, other)
    assert_close(one, torch.where(mask, -advantages, 0))


def test_reinforce_on_a_bandit() -> None:
    # Three arms, softmax of z, reward r: the gradient of -E[r] is -π_k (r_k - Σ π r) in closed form.
    z = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    pi = z.softmax(-1).detach()
    loss = reinforce(z.log_softmax(-1)[:, None], (rewards - 0.3)[:, None], torch.ones(3, 1, dtype=torch.bool))
    (gradient,) = torch.autograd.grad((pi * loss[:, 0]).sum(), z)  # a baseline of .3 changes nothing
    assert_close(gradient, -pi * (rewards - (pi * rewards).sum()))


def test_padding_may_hold_anything() -> None:
    mask = torch.tensor([[True, False]])
    logps = row(-1.0, NAN).requires_grad_()
    values = row(0.5, NAN).requires_grad_()
    for loss, of in (
        (ppo_clip(logps, row(-1.1, NAN), row(2.0, NAN), mask), logps),
        (reinforce(logps, row(2.0, NAN), mask), logps),
        (value_clip(values, row(0.4, NAN), row(1.0, NAN), mask), values),
        (value_clip(values, row(0.4, NAN), row(1.0, NAN), mask, clip=None), values),
    ):
        assert loss[0, 1] == 0
        (gradient,) = torch.autograd.grad(loss.sum(), of)
        assert gradient[0, 0] != 0
        assert gradient[0, 1] == 0


def test_arguments_are_checked() -> None:
    one = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="mask is of type"):
        reinforce(one, one, one)
    with pytest.raises(ValueError, match=r"old_logps has shape \(1, 1\)"):
        ppo_clip(one, torch.zeros(1, 1), one, one > 0)
    with pytest.raises(ValueError, match=r"clip is 0\.0"):
        value_clip(one, one, one, one > 0, clip=0.0)
