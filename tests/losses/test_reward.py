import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from palate.losses import bradley_terry, dpo

REWARD = st.floats(-50, 50)
ROWS = st.lists(st.tuples(REWARD, REWARD), min_size=1, max_size=4)


def columns(rows: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return chosen, rejected


@pytest.mark.parametrize(
    ("margin", "values", "slopes"),
    [
        # Differences d = [0, 2, -1]: L = log(1 + e^-d), dL/dchosen = -s(-d)
        # s(-2) = 0.119203, s(1) = 0.731059
        (0.0, [0.693147, 0.126928, 1.313262], [-0.5, -0.119203, -0.731059]),
        # One margin of 1: d - 1 = [-1, 1, -2]; log(1 + e^-1) = 0.313262, log(1 + e^2) = 2.126928
        (1.0, [1.313262, 0.313262, 2.126928], [-0.731059, -0.268941, -0.880797]),
        # A margin each: d - m = [0 - 0, 2 - 3, -1 + 1] = [0, -1, 0]; one below 0 is taken as it is
        (torch.tensor([0.0, 3.0, -1.0]), [0.693147, 1.313262, 0.693147], [-0.5, -0.731059, -0.5]),
    ],
)
def test_golden_value_and_gradient(margin: float | Tensor, values: list[float], slopes: list[float]) -> None:
    chosen = torch.tensor([1.0, 2.5, -1.0], requires_grad=True)
    rejected = torch.tensor([1.0, 0.5, 0.0], requires_grad=True)
    loss = bradley_terry(chosen, rejected, margin=margin)
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert_close(loss, torch.tensor(values), atol=1e-6, rtol=0)
    assert_close(by_chosen, torch.tensor(slopes), atol=1e-6, rtol=0)
    assert_close(by_rejected, -torch.tensor(slopes), atol=1e-6, rtol=0)


def test_matches_numpy_on_random_input() -> None:
    chosen, rejected, margin = np.random.default_rng(3).normal(scale=20.0, size=(3, 200))
    got = bradley_terry(*(torch.from_numpy(x) for x in (chosen, rejected)), margin=torch.from_numpy(margin))
    assert_close(got.numpy(), np.logaddexp(0.0, rejected + margin - chosen), atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    rewards = [x.requires_grad_() for x in columns([(0.3, -1.2), (2.0, 5.0), (-4.0, 4.0)])]
    assert torch.autograd.gradcheck(lambda c, r: bradley_terry(c, r, margin=0.7), rewards)


@given(rows=ROWS, shift=st.floats(-100, 100))
def test_only_the_difference_counts(rows: list[tuple[float, float]], shift: float) -> None:
    chosen, rejected = columns(rows)
    shifted = bradley_terry(chosen + shift, rejected + shift)
    assert_close(shifted, bradley_terry(chosen, rejected), atol=1e-9, rtol=1e-9)


@given(rows=ROWS)
def test_swapped_mirrors_the_difference(rows: list[tuple[float, float]]) -> None:
    # -log s(d) + log s(-d) = -d
    chosen, rejected = columns(rows)
    odds = bradley_terry(rejected, chosen) - bradley_terry(chosen, rejected)
    assert_close(odds, chosen - rejected, atol=1e-9, rtol=1e-9)


@given(rows=ROWS, beta=st.floats(1e-3, 10))
def test_dpo_is_bradley_terry_on_implicit_rewards(rows: list[tuple[float, float]], beta: float) -> None:
    chosen, rejected = columns(rows)
    zero = torch.zeros_like(chosen)
    implicit = bradley_terry(beta * chosen, beta * rejected)
    assert_close(dpo(chosen, rejected, zero, zero, beta=beta), implicit, atol=1e-9, rtol=1e-9)


def test_far_rewards_stay_exact_in_float32() -> None:
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = bradley_terry(chosen, torch.zeros(2))
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert loss.tolist() == [1e4, 0.0]
    assert slope.tolist() == [-1.0, 0.0]


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rejected_rewards has shape \(3,\) but chosen_rewards has \(2,\)"):
        bradley_terry(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"margin has shape \(1,\) but chosen_rewards has \(2,\)"):
        bradley_terry(torch.zeros(2), torch.zeros(2), margin=torch.zeros(1))
    with pytest.raises(ValueError, match=r"chosen_rewards has shape \(2, 1\), expected \(B,\)"):
        bradley_terry(torch.zeros(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("margin", [-0.1, math.nan, math.inf])
def test_one_margin_for_all_is_not_negative(margin: float) -> None:
    with pytest.raises(ValueError, match=f"margin is {margin}, expected a finite number, 0 or above"):
        bradley_terry(torch.zeros(2), torch.zeros(2), margin=margin)
