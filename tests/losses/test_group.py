import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from palate.losses import rrhf

Array = npt.NDArray[np.float64]
Groups = list[tuple[float, float]]

P, R = st.floats(-8, 0), st.sampled_from([-2.0, 0.0, 0.5, 1.0, 3.0])
GROUP = st.lists(st.tuples(P, R), min_size=1, max_size=6)


def one(group: Groups) -> tuple[Tensor, Tensor]:
    """Log-probabilities and rewards of one group. (1, G)"""
    logps, rewards = torch.tensor([group], dtype=torch.float64).unbind(-1)
    return logps, rewards


# ---- Golden values ---------------------------------------------------------------------------------


def test_golden_value_and_gradient() -> None:
    # First group, r = [2, 0, 1], p = [-1, -0.5, -2]. Pairs of a worse i and a better j:
    #   (1, 0): -0.5 + 1 = 0.5    (1, 2): -0.5 + 2 = 1.5    (2, 0): -2 + 1 < 0, in order
    # L = 2; dL/dp = -1 for each time it is too low, +1 for each time it is too high = [-1, 2, -1]
    # Second group, in order throughout: L = 0 and no gradient.
    logps = torch.tensor([[-1.0, -0.5, -2.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    loss = rrhf(logps, torch.tensor([[2.0, 0.0, 1.0], [5.0, 4.0, 3.0]]))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.tolist() == [2.0, 0.0]
    assert slope.tolist() == [[-1.0, 2.0, -1.0], [0.0, 0.0, 0.0]]


def test_golden_pair() -> None:
    # The better one at -12 over 10 tokens, the worse at -15 over 12: -1.25 + 1.2 < 0; swapped rewards: 0.05.
    logps = torch.tensor([[-12 / 10, -15 / 12]])
    assert rrhf(logps, torch.tensor([[1.0, 0.0]])).tolist() == [0.0]
    assert_close(rrhf(logps, torch.tensor([[0.0, 1.0]])), torch.tensor([0.05]), atol=1e-6, rtol=0)


def test_equal_rewards_make_no_term() -> None:
    logps = torch.tensor([[-1.0, -5.0, -2.0]], requires_grad=True)
    loss = rrhf(logps, torch.tensor([[1.0, 1.0, 1.0]]))
    assert loss.tolist() == [0.0]
    assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [[0.0, 0.0, 0.0]]
    # r = [1, 1, 2], p = [-1, -5, -2]: only the last is better than others; -1 + 2 = 1, -5 + 2 < 0
    assert rrhf(logps, torch.tensor([[1.0, 1.0, 2.0]])).tolist() == [1.0]


def test_no_gradient_at_the_kink() -> None:
    logps = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    (slope,) = torch.autograd.grad(rrhf(logps, torch.tensor([[0.0, 1.0]])).sum(), logps)
    assert slope.tolist() == [[0.0, 0.0]]


# ---- Oracle ----------------------------------------------------------------------------------------


def oracle(logps: Array, rewards: Array, mask: npt.NDArray[np.bool_]) -> Array:
    """The sum written out, pair by pair."""
    totals = []
    for p, r, m in zip(logps, rewards, mask, strict=True):
        inside = [i for i in range(len(p)) if m[i] and np.isfinite(r[i])]
        totals.append(sum(max(0.0, p[i] - p[j]) for i in inside for j in inside if r[i] < r[j]))
    return np.array(totals, dtype=np.float64)


def test_matches_numpy_on_random_input() -> None:
    rng = np.random.default_rng(5)
    logps, rewards = -rng.exponential(2.0, size=(100, 7)), rng.integers(0, 4, size=(100, 7)).astype(float)
    rewards[rng.uniform(size=rewards.shape) < 0.2] = np.nan
    mask = np.arange(7) < rng.integers(0, 8, size=(100, 1))
    got = rrhf(torch.from_numpy(logps), torch.from_numpy(rewards), torch.from_numpy(mask))
    assert_close(got.numpy(), oracle(logps, rewards, mask), atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    logps = torch.tensor(
        [[-1.0, -0.3, -2.0, -0.7], [-4.0, -1.5, -0.1, -3.0]], dtype=torch.float64, requires_grad=True
    )
    rewards = torch.tensor([[2.0, 0.0, 1.0, math.nan], [1.0, 1.0, 0.0, 5.0]])
    assert torch.autograd.gradcheck(lambda p: rrhf(p, rewards), logps)


# ---- Who takes part --------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_unusable_rewards_take_no_part(reward: float) -> None:
    logps = torch.tensor([[-1.0, -0.5, -9.0, -0.1, -2.0]], requires_grad=True)
    loss = rrhf(logps, torch.tensor([[2.0, 0.0, reward, reward, 1.0]]))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.tolist() == [2.0]  # of the golden group
    assert slope.tolist() == [[-1.0, 2.0, 0.0, 0.0, -1.0]]


@pytest.mark.parametrize("padding", [0.0, math.nan, -math.inf, math.inf])
def test_padding_changes_nothing(padding: float) -> None:
    logps = torch.tensor([[-1.0, -0.5, -2.0, padding, padding]], requires_grad=True)
    rewards = torch.tensor([[2.0, 0.0, 1.0, 7.0, -7.0]])
    loss = rrhf(logps, rewards, torch.tensor([[True, True, True, False, False]]))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.tolist() == [2.0]
    assert slope.tolist() == [[-1.0, 2.0, -1.0, 0.0, 0.0]]
    # Nor where the others are above what stands in for padding inside.
    assert rrhf(logps + 8, rewards, torch.tensor([[True, True, True, False, False]])).tolist() == [2.0]


def test_group_of_fewer_than_two_has_no_loss() -> None:
    logps = torch.full((3, 2), -1.0, requires_grad=True)
    rewards = torch.tensor([[math.nan, math.nan], [1.0, math.nan], [1.0, 2.0]])
    mask = torch.tensor([[True, True], [True, True], [False, False]])
    loss = rrhf(logps, rewards, mask)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.tolist() == [0.0, 0.0, 0.0]
    assert not slope.any()


# ---- Properties ------------------------------------------------------------------------------------


@given(group=GROUP, shift=st.floats(-5, 5))
def test_shift_changes_nothing(group: Groups, shift: float) -> None:
    logps, rewards = one(group)
    assert_close(rrhf(logps + shift, rewards), rrhf(logps, rewards), atol=1e-12, rtol=1e-12)


@given(group=GROUP)
def test_only_the_order_of_rewards_counts(group: Groups) -> None:
    logps, rewards = one(group)
    assert_close(rrhf(logps, rewards.exp() - 100), rrhf(logps, rewards), atol=0, rtol=0)


@given(group=GROUP)
def test_reversed_rewards_find_the_other_pairs(group: Groups) -> None:
    # Every pair of unlike reward is in order under one of the two: together they sum |p_i - p_j|.
    logps, rewards = one(group)
    both = rrhf(logps, rewards) + rrhf(logps, -rewards)
    expected = sum(abs(p - q) for i, (p, r) in enumerate(group) for q, s in group[:i] if r != s)
    assert_close(both.item(), float(expected), atol=1e-12, rtol=1e-12)


@given(group=GROUP, scale=st.floats(0.1, 10))
def test_grows_with_the_log_probabilities(group: Groups, scale: float) -> None:
    logps, rewards = one(group)
    assert_close(rrhf(scale * logps, rewards), scale * rrhf(logps, rewards), atol=1e-12, rtol=1e-12)


@given(group=GROUP, order=st.permutations(range(6)))
def test_order_in_the_group_does_not_matter(group: Groups, order: list[int]) -> None:
    shuffled = [group[i] for i in order if i < len(group)]
    assert_close(rrhf(*one(shuffled)), rrhf(*one(group)), atol=1e-12, rtol=1e-12)


@given(group=GROUP)
def test_gradients_of_a_group_cancel(group: Groups) -> None:
    logps, rewards = one(group)
    loss = rrhf(logps.requires_grad_(), rewards)
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    assert slope.sum().item() == 0.0


def test_groups_are_independent() -> None:
    logps = torch.tensor([[math.nan, -1.0], [-1.0, -0.5]])
    rewards = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert rrhf(logps, rewards)[1].item() == 0.5
    assert_close(rrhf(logps.flip(0), rewards.flip(0))[0], rrhf(logps, rewards)[1])


# ---- Errors ----------------------------------------------------------------------------------------


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rewards has shape \(2, 2\) but mean_logps has \(2, 3\)"):
        rrhf(torch.zeros(2, 3), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\) but .*expected one shape \(B, G\)"):
        rrhf(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mean_logps has shape \(2,\), expected \(B, G\)"):
        rrhf(torch.zeros(2), torch.zeros(2))


def test_mask_is_bool() -> None:
    with pytest.raises(ValueError, match=r"mask is of type torch.float32, expected torch.bool"):
        rrhf(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3))
