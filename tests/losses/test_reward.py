import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from palate.losses import bradley_terry, dpo, soft_preference

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


# ---- soft_preference -------------------------------------------------------------------------------


def test_soft_golden_value_and_gradient() -> None:
    # d = a - b = [0, 2, 2, -1], p = [0.3, 1, 0.25, 0]; log(1 + e^-2) = 0.126928, log(1 + e^2) = 2.126928
    # L = [log 2, 0.126928, 0.25 * 0.126928 + 0.75 * 2.126928, log(1 + e^-1) = 0.313262]
    # dL/da = s(d) - p: s(0) = 0.5, s(2) = 0.880797, s(-1) = 0.268941
    a = torch.tensor([1.0, 2.5, 2.5, -1.0], requires_grad=True)
    b = torch.tensor([1.0, 0.5, 0.5, 0.0], requires_grad=True)
    loss = soft_preference(a, b, torch.tensor([0.3, 1.0, 0.25, 0.0]))
    by_a, by_b = torch.autograd.grad(loss.sum(), (a, b))
    assert_close(loss, torch.tensor([0.693147, 0.126928, 1.626928, 0.313262]), atol=1e-6, rtol=0)
    slopes = torch.tensor([0.2, -0.119203, 0.630797, 0.268941])
    assert_close(by_a, slopes, atol=1e-6, rtol=0)
    assert_close(by_b, -slopes, atol=1e-6, rtol=0)


def test_soft_matches_numpy_on_random_input() -> None:
    rng = np.random.default_rng(4)
    a, b, p = rng.normal(scale=20.0, size=200), rng.normal(scale=20.0, size=200), rng.uniform(size=200)
    logits = np.stack([a, b], -1)
    log_softmax = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    expected = -(np.stack([p, 1 - p], -1) * log_softmax).sum(-1)
    got = soft_preference(*(torch.from_numpy(x) for x in (a, b, p)))
    assert_close(got.numpy(), expected, atol=1e-11, rtol=1e-11)


def test_soft_gradcheck() -> None:
    rewards = [x.requires_grad_() for x in columns([(0.3, -1.2), (2.0, 5.0), (-4.0, 4.0)])]
    p = torch.tensor([0.9, 0.35, 0.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: soft_preference(a, b, p), rewards)


@given(rows=ROWS, p=st.floats(0, 1), shift=st.floats(-100, 100))
def test_soft_sees_only_the_difference_and_mirrors_when_swapped(
    rows: list[tuple[float, float]], p: float, shift: float
) -> None:
    a, b = columns(rows)
    label = torch.full_like(a, p)
    loss = soft_preference(a, b, label)
    assert_close(soft_preference(a + shift, b + shift, label), loss, atol=1e-9, rtol=1e-9)
    assert_close(soft_preference(b, a, 1 - label), loss, atol=1e-9, rtol=1e-9)
    # A label p instead of 1 - p changes the loss by -(2 p - 1) d.
    flipped = soft_preference(a, b, 1 - label)
    assert_close(loss - flipped, (1 - 2 * p) * (a - b), atol=1e-9, rtol=1e-9)


@given(rows=ROWS)
def test_a_hard_label_is_bradley_terry(rows: list[tuple[float, float]]) -> None:
    a, b = columns(rows)
    one = torch.ones_like(a)
    assert_close(soft_preference(a, b, one), bradley_terry(a, b), atol=0, rtol=0)
    assert_close(soft_preference(a, b, 1 - one), bradley_terry(b, a), atol=0, rtol=0)


@given(p=st.floats(0.01, 0.99))
def test_soft_is_least_at_the_labels_odds(p: float) -> None:
    best = math.log(p / (1 - p))
    a = torch.tensor([best - 0.1, best, best + 0.1], dtype=torch.float64, requires_grad=True)
    loss = soft_preference(a, torch.zeros_like(a), torch.full_like(a, p))
    (slope,) = torch.autograd.grad(loss.sum(), a)
    assert slope[0] < 0 < slope[2]
    assert_close(slope[1].item(), 0.0, atol=1e-12, rtol=0)
    assert_close(loss[1].item(), -p * math.log(p) - (1 - p) * math.log(1 - p), atol=1e-12, rtol=0)


def test_soft_far_rewards_stay_exact_in_float32() -> None:
    a = torch.tensor([-1e4, 1e4, 1e4], requires_grad=True)
    loss = soft_preference(a, torch.zeros(3), torch.tensor([1.0, 1.0, 0.75]))
    (slope,) = torch.autograd.grad(loss.sum(), a)
    assert loss.tolist() == [1e4, 0.0, 2.5e3]
    assert slope.tolist() == [-1.0, 0.0, 0.25]


@pytest.mark.parametrize("wrong", [-0.01, 1.5, math.nan])
def test_soft_labels_are_probabilities(wrong: float) -> None:
    p = torch.tensor([0.5, wrong], dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"p has the value {wrong}, expected probabilities in \[0, 1\]"):
        soft_preference(torch.zeros(2), torch.zeros(2), p)


def test_soft_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"p has shape \(1,\) but reward_a has \(2,\)"):
        soft_preference(torch.zeros(2), torch.zeros(2), torch.zeros(1))
    with pytest.raises(ValueError, match=r"reward_a has shape \(2, 1\), expected \(B,\)"):
        soft_preference(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1))
