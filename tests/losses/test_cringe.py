import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from palate.losses import cringe, pairwise_cringe

LOGIT = st.floats(-60, 60)
LOGITS = st.lists(st.tuples(LOGIT, LOGIT), min_size=1, max_size=5)
POSITIVE, LOGP = st.floats(0, 50), st.floats(-300, 0)
PAIRS = st.lists(st.tuples(POSITIVE, POSITIVE, LOGP, LOGP), min_size=1, max_size=4)

Pairs = list[tuple[float, float, float, float]]


def columns(rows: list[tuple[float, ...]]) -> tuple[Tensor, ...]:
    return torch.tensor(rows, dtype=torch.float64).unbind(1)


def gate(nll: float, spoilt: float, m: float, **options: float) -> float:
    """The loss of one pair with M = m."""
    values = [torch.tensor([x], dtype=torch.float64) for x in (nll, spoilt, m, 0.0)]
    return pairwise_cringe(*values, **options).item()  # type: ignore[arg-type]


# ---- cringe ----------------------------------------------------------------------------------------


def test_cringe_golden_value_and_gradient() -> None:
    # s - s* = [2 - 1.5, 0, -1 - 2] = [0.5, 0, -3]
    # L = log(1 + e^.5) = 0.974077, log 2, log(1 + e^-3) = 0.048587
    # dL/ds = s(s - s*) = 0.622459, 0.5, 0.047426; dL/ds* is its negative
    negative = torch.tensor([2.0, 1.0, -1.0], requires_grad=True)
    contrast = torch.tensor([1.5, 1.0, 2.0], requires_grad=True)
    loss = cringe(negative, contrast)
    by_negative, by_contrast = torch.autograd.grad(loss.sum(), (negative, contrast))
    assert_close(loss, torch.tensor([0.974077, 0.693147, 0.048587]), atol=1e-6, rtol=0)
    slopes = torch.tensor([0.622459, 0.5, 0.047426])
    assert_close(by_negative, slopes, atol=1e-6, rtol=0)
    assert_close(by_contrast, -slopes, atol=1e-6, rtol=0)


def test_cringe_is_the_cross_entropy_of_two_logits() -> None:
    negative, contrast = np.random.default_rng(6).normal(scale=20.0, size=(2, 50, 4))
    expected = np.logaddexp(negative, contrast) - contrast
    got = cringe(torch.from_numpy(negative), torch.from_numpy(contrast))
    assert_close(got.numpy(), expected, atol=1e-12, rtol=1e-12)


def test_cringe_gradcheck() -> None:
    logits = [x.requires_grad_() for x in columns([(0.3, -1.2), (25.0, 5.0), (-4.0, 4.0)])]
    assert torch.autograd.gradcheck(cringe, logits)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
def test_cringe_takes_any_shape(shape: tuple[int, ...]) -> None:
    loss = cringe(torch.zeros(shape), torch.zeros(shape))
    assert_close(loss, torch.full(shape, math.log(2)))


@given(rows=LOGITS, shift=st.floats(-100, 100))
def test_cringe_sees_only_the_difference(rows: list[tuple[float, float]], shift: float) -> None:
    negative, contrast = columns(list(rows))
    loss = cringe(negative, contrast)
    assert_close(cringe(negative + shift, contrast + shift), loss, atol=1e-9, rtol=1e-9)
    # log(1 + e^d) - log(1 + e^-d) = d
    assert_close(loss - cringe(contrast, negative), negative - contrast, atol=1e-9, rtol=1e-9)


def test_cringe_with_a_detached_contrast_pushes_the_negative_alone() -> None:
    negative, contrast = (torch.zeros(1, requires_grad=True) for _ in range(2))
    cringe(negative, contrast.detach()).sum().backward()
    assert negative.grad is not None
    assert negative.grad.tolist() == [0.5]
    assert contrast.grad is None


def test_cringe_far_logits_stay_exact_in_float32() -> None:
    negative = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = cringe(negative, torch.zeros(2))
    (slope,) = torch.autograd.grad(loss.sum(), negative)
    assert loss.tolist() == [0.0, 1e4]
    assert slope.tolist() == [0.0, 1.0]


def test_cringe_shapes_are_checked() -> None:
    message = r"contrast_logits has shape \(3, 1\) but negative_logits has \(3,\), expected one shape of any"
    with pytest.raises(ValueError, match=message):
        cringe(torch.zeros(3), torch.zeros(3, 1))


# ---- pairwise_cringe -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "tau", "gate", "from_gate"),
    [
        # M = -12 + 15 = 3. g = s((0 - 3)/1) = s(-3) = 0.047426, g (1 - g)/1 = 0.045177
        (0.0, 1.0, 0.047426, 0.045177),
        # g = s((5 - 3)/10) = s(0.2) = 0.549834, g (1 - g)/10 = 0.0247517
        (5.0, 10.0, 0.549834, 0.0247517),
    ],
)
@pytest.mark.parametrize("detach", [False, True])
def test_golden_value_and_gradient(b: float, tau: float, gate: float, from_gate: float, detach: bool) -> None:
    # Bracket 1.2 + 0.5 * 2 = 2.2. dL/dnll = g, dL/dcringe = alpha g, dL/dchosen = -g (1 - g)/tau * 2.2
    values = [torch.tensor([x], requires_grad=True) for x in (1.2, 2.0, -12.0, -15.0)]
    loss = pairwise_cringe(
        values[0], values[1], values[2], values[3], b=b, tau=tau, alpha=0.5, detach_gate=detach
    )
    slopes = torch.autograd.grad(loss.sum(), values, allow_unused=True)
    assert_close(loss.item(), 2.2 * gate, atol=1e-5, rtol=0)
    found = [0.0 if slope is None else slope.item() for slope in slopes]
    push = 0.0 if detach else 2.2 * from_gate
    assert_close(torch.tensor(found), torch.tensor([gate, 0.5 * gate, -push, push]), atol=1e-6, rtol=0)


def test_matches_numpy_on_random_input() -> None:
    rng = np.random.default_rng(7)
    nll, spoilt = rng.exponential(3.0, size=(2, 200))
    chosen, rejected = -rng.exponential(40.0, size=(2, 200))
    expected = (nll + 0.7 * spoilt) / (1 + np.exp((chosen - rejected - 3.0) / 12.0))
    tensors = [torch.from_numpy(x) for x in (nll, spoilt, chosen, rejected)]
    for detach in (False, True):
        got = pairwise_cringe(*tensors, b=3.0, tau=12.0, alpha=0.7, detach_gate=detach)
        assert_close(got.numpy(), expected, atol=1e-12, rtol=1e-12)


def test_gradcheck() -> None:
    leaves = [x.requires_grad_() for x in columns([(1.2, 2.0, -12.0, -15.0), (3.0, 0.4, -30.0, -8.0)])]
    assert torch.autograd.gradcheck(
        lambda *x: pairwise_cringe(*x, b=1.0, tau=4.0, alpha=0.5),
        leaves,
    )


@given(rows=PAIRS, shift=st.floats(-100, 100))
def test_gate_sees_only_the_difference(rows: Pairs, shift: float) -> None:
    nll, spoilt, chosen, rejected = columns(list(rows))
    loss = pairwise_cringe(nll, spoilt, chosen, rejected, b=2.0, tau=5.0, alpha=1.0)
    shifted = pairwise_cringe(nll, spoilt, chosen + shift, rejected + shift, b=2.0, tau=5.0, alpha=1.0)
    assert_close(shifted, loss, atol=1e-9, rtol=1e-9)
    moved = pairwise_cringe(nll, spoilt, chosen + shift, rejected, b=2.0 + shift, tau=5.0, alpha=1.0)
    assert_close(moved, loss, atol=1e-9, rtol=1e-9)


@given(rows=PAIRS)
def test_swapped_gates_sum_to_one(rows: Pairs) -> None:
    # s(z) + s(-z) = 1: at b = 0 the two orders of a pair share the bracket between them.
    nll, spoilt, chosen, rejected = columns(list(rows))
    loss = pairwise_cringe(nll, spoilt, chosen, rejected, b=0.0, tau=5.0, alpha=0.3)
    swapped = pairwise_cringe(nll, spoilt, rejected, chosen, b=0.0, tau=5.0, alpha=0.3)
    assert_close(loss + swapped, nll + 0.3 * spoilt, atol=1e-9, rtol=1e-9)


def test_gate_is_half_open_at_b_and_fades_out() -> None:
    assert gate(2.0, 0.0, 7.0, b=7.0, tau=3.0, alpha=1.0) == 1.0
    assert gate(2.0, 0.0, -1e5, b=7.0, tau=3.0, alpha=1.0) == 2.0
    assert gate(2.0, 0.0, 1e5, b=7.0, tau=3.0, alpha=1.0) == 0.0
    # Soft without limit: half open for all. Hard without limit: a step at b.
    assert_close(gate(2.0, 0.0, 50.0, b=7.0, tau=1e9, alpha=1.0), 1.0, atol=1e-6, rtol=0)
    assert gate(2.0, 0.0, 6.9, b=7.0, tau=1e-6, alpha=1.0) == 2.0
    assert gate(2.0, 0.0, 7.1, b=7.0, tau=1e-6, alpha=1.0) == 0.0


def test_alpha_weighs_the_cringe_term() -> None:
    assert gate(2.0, 10.0, 0.0, b=0.0, tau=1.0, alpha=0.0) == 1.0
    assert gate(2.0, 10.0, 0.0, b=0.0, tau=1.0, alpha=0.4) == 3.0


def test_gradient_through_the_gate_raises_chosen_against_rejected() -> None:
    chosen, rejected = (torch.tensor([-20.0], requires_grad=True) for _ in range(2))
    loss = pairwise_cringe(torch.ones(1), torch.ones(1), chosen, rejected, b=0.0, tau=2.0, alpha=1.0)
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert by_chosen.item() == -0.25  # g (1 - g)/tau * 2 = 0.25 / 2 * 2
    assert by_rejected.item() == 0.25


def test_rows_are_independent() -> None:
    rows: Pairs = [(1.2, 2.0, -12.0, -15.0), (3.0, 0.4, -30.0, -8.0)]
    loss = pairwise_cringe(*columns(list(rows)), b=1.0, tau=4.0, alpha=0.5)
    spoiled = pairwise_cringe(*columns([(math.nan,) * 4, rows[1]]), b=1.0, tau=4.0, alpha=0.5)
    assert_close(spoiled[1], loss[1])
    assert_close(pairwise_cringe(*columns(list(rows[::-1])), b=1.0, tau=4.0, alpha=0.5), loss.flip(0))


# ---- Errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [1, 2, 3])
def test_shapes_are_checked(position: int) -> None:
    values = [torch.zeros(3 if i == position else 2) for i in range(4)]
    with pytest.raises(ValueError, match=r"has shape \(3,\) but positive_nll has \(2,\)"):
        pairwise_cringe(*values, b=0.0, tau=1.0, alpha=1.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 0.0}, "tau is 0.0, expected a finite number above 0"),
        ({"tau": math.inf}, "tau is inf, expected a finite number above 0"),
        ({"alpha": -0.1}, "alpha is -0.1, expected a finite number, 0 or above"),
        ({"alpha": math.nan}, "alpha is nan, expected a finite number, 0 or above"),
        ({"b": math.inf}, "b is inf, expected a finite number"),
        ({"b": math.nan}, "b is nan, expected a finite number"),
    ],
)
def test_numbers_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(1.0, 1.0, 0.0, **{"b": 0.0, "tau": 1.0, "alpha": 1.0} | options)
