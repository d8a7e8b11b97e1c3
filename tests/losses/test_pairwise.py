import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from palate.losses import PAIR_LOSSES, PairLoss, click, dpo, hinge_norm, ipo, rso_hinge, slic_rank

Rows = list[tuple[float, float, float, float]]
Array = npt.NDArray[np.float64]

LOGP = st.floats(-300, 0)
ROWS = st.lists(st.tuples(LOGP, LOGP, LOGP, LOGP), min_size=1, max_size=4)
STRENGTH = st.floats(1e-3, 10)

ALL = pytest.mark.parametrize("name", PAIR_LOSSES)
WITH_REF = pytest.mark.parametrize("name", [name for name, loss in PAIR_LOSSES.items() if loss.needs_ref])
HINGES = pytest.mark.parametrize("name", ["hinge_norm", "rso_hinge", "slic_rank", "click"])


def columns(rows: Rows, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of (chosen, rejected, ref_chosen, ref_rejected) as four tensors (B,)."""
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor(rows, dtype=dtype).unbind(1)
    return chosen, rejected, ref_chosen, ref_rejected


def margin(name: str, rows: Rows) -> Tensor:
    """What the loss sees of the pairs: h, or without a reference the difference of log-probabilities."""
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    gap = chosen - rejected
    return gap - (ref_chosen - ref_rejected) if PAIR_LOSSES[name].needs_ref else gap


def at_margin(h: list[float], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Log-probabilities that put a pair at the given margins: h for the chosen, 0 for all else."""
    chosen = torch.tensor(h, dtype=dtype, requires_grad=True)
    return chosen, torch.zeros_like(chosen)


# ---- Golden values ---------------------------------------------------------------------------------

# One pair: log π = -12 chosen, -15 rejected; log ref = -13.5 and -14.
# h = (-12 + 13.5) - (-15 + 14) = 1.5 + 1 = 2.5; without a reference the difference is -12 + 15 = 3.
PAIR: Rows = [(-12.0, -15.0, -13.5, -14.0)]


@pytest.mark.parametrize(
    ("name", "strength", "options", "value", "slope"),
    [
        # L = log(1 + e^-z), dL/dh = -beta s(-z), z = beta h = 0.25; s(-0.25) = 0.4378235
        ("dpo", 0.1, {}, 0.575939, -0.04378235),
        # cDPO: 0.9 log(1 + e^-.25) + 0.1 log(1 + e^.25) = 0.9 * 0.575939 + 0.1 * 0.825939;
        # dL/dh = -beta (0.9 s(-z) - 0.1 s(z)) = -beta (s(-z) - 0.1) = -0.1 * 0.3378235
        ("dpo", 0.1, {"label_smoothing": 0.1}, 0.600939, -0.03378235),
        # RSO's sigmoid-norm: z = 0.05 * 2.5 = 0.125; s(-0.125) = 0.46879063
        ("dpo", 0.05, {}, 0.632599, -0.0234395),
        # Target 1/(2 * 0.1) = 5: (2.5 - 5)^2, slope 2 (2.5 - 5), still below it
        ("ipo", 0.1, {}, 6.25, -5.0),
        # Target 0.5: (2.5 - 0.5)^2, slope 2 (2.5 - 0.5), beyond it and pushed back
        ("ipo", 1.0, {}, 4.0, 4.0),
        # 1 - 0.05 * 2.5 (RSO) and 1 - 0.002 * 2.5 (what OAIF calls SLiC)
        ("hinge_norm", 0.05, {}, 0.875, -0.05),
        ("hinge_norm", 0.002, {}, 0.995, -0.002),
        # 1 - 0.05 * 3: the reference plays no part
        ("rso_hinge", 0.05, {}, 0.85, -0.05),
        # 1 - 3 < 0: satisfied; 4 - 3 = 1
        ("slic_rank", 1.0, {}, 0.0, 0.0),
        ("slic_rank", 4.0, {}, 1.0, -1.0),
        # 15 - 3, and 2 - 3 < 0: satisfied
        ("click", 15.0, {}, 12.0, -1.0),
        ("click", 2.0, {}, 0.0, 0.0),
    ],
)
def test_golden_value_and_gradient(
    name: str, strength: float, options: dict[str, float], value: float, slope: float
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(PAIR)
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss = PAIR_LOSSES[name](chosen, rejected, ref_chosen, ref_rejected, strength, **options)
    by_chosen, by_rejected = torch.autograd.grad(loss.sum(), (chosen, rejected))
    assert_close(loss.item(), value, atol=1e-6, rtol=0)
    assert_close(by_chosen.item(), slope, atol=1e-7, rtol=0)
    assert_close(by_rejected.item(), -slope, atol=1e-7, rtol=0)  # all see only chosen minus rejected


def test_dpo_golden_batch() -> None:
    # h = [(-1+1) - (-1+1), (-2+4) - (-6+4)] = [0, 4], beta h = [0, 2]
    # L = [log 2, log(1 + e^-2)] = [0.693147, 0.126928]
    # dL/dchosen = -beta s(-beta h) = [-0.5 * 0.5, -0.5 * 0.119203]
    chosen = torch.tensor([-1.0, -2.0], requires_grad=True)
    rejected, ref = torch.tensor([-1.0, -6.0]), torch.tensor([-1.0, -4.0])
    loss = dpo(chosen, rejected, ref, ref, beta=0.5)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert_close(loss, torch.tensor([0.693147, 0.126928]), atol=1e-6, rtol=0)
    assert_close(slope, torch.tensor([-0.25, -0.0596015]), atol=1e-6, rtol=0)


# ---- Oracles ---------------------------------------------------------------------------------------


def logistic(z: Array) -> Array:
    return np.asarray(np.logaddexp(0.0, -z))


ORACLES: dict[str, Callable[[Array, Array, float], Array]] = {  # of (gap, gap of the reference, strength)
    "dpo": lambda gap, ref_gap, beta: logistic(beta * (gap - ref_gap)),
    "ipo": lambda gap, ref_gap, tau: np.square(gap - ref_gap - 0.5 / tau),
    "hinge_norm": lambda gap, ref_gap, gamma: np.maximum(0.0, 1.0 - gamma * (gap - ref_gap)),
    "rso_hinge": lambda gap, _, gamma: np.maximum(0.0, 1.0 - gamma * gap),
    "slic_rank": lambda gap, _, delta: np.maximum(0.0, delta - gap),
    "click": lambda gap, _, margin: np.maximum(0.0, margin - gap),
}


@ALL
@pytest.mark.parametrize("strength", [0.01, 0.3, 7.0])
def test_matches_numpy_on_random_input(name: str, strength: float) -> None:
    table = -np.random.default_rng(1).exponential(40.0, size=(200, 4))
    chosen, rejected, ref_chosen, ref_rejected = table.T
    expected = ORACLES[name](chosen - rejected, ref_chosen - ref_rejected, strength)
    got = PAIR_LOSSES[name](*columns(table.tolist()), strength)
    assert_close(got.numpy(), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("flip", [0.05, 0.49])
def test_label_smoothing_is_the_expected_loss_over_flips(flip: float) -> None:
    table = -np.random.default_rng(2).exponential(40.0, size=(200, 4))
    z = 0.2 * (table[:, 0] - table[:, 1] - table[:, 2] + table[:, 3])
    expected = (1 - flip) * logistic(z) + flip * logistic(-z)
    got = dpo(*columns(table.tolist()), beta=0.2, label_smoothing=flip)
    assert_close(got.numpy(), expected, atol=1e-11, rtol=1e-11)


@ALL
@pytest.mark.parametrize("strength", [0.05, 0.7])
def test_gradcheck(name: str, strength: float) -> None:
    leaves = columns([(-3.0, -4.5, -3.5, -4.0), (-9.0, -2.0, -5.0, -5.5), (-1.0, -31.0, -2.0, -3.0)])
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c, r, ref_c, ref_r: PAIR_LOSSES[name](c, r, ref_c, ref_r, strength), leaves
    )


# ---- Properties ------------------------------------------------------------------------------------


@given(rows=ROWS, beta=STRENGTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dpo_is_exactly_log_2_at_the_reference(dtype: torch.dtype, rows: Rows, beta: float) -> None:
    chosen, rejected, _, _ = columns(rows, dtype)
    loss = dpo(chosen, rejected, chosen, rejected, beta=beta)
    assert_close(loss, torch.full_like(chosen, math.log(2)), atol=0, rtol=0)


@given(rows=ROWS, beta=STRENGTH, flip=st.floats(0, 0.49))
def test_dpo_swapped_mirrors_the_margin(rows: Rows, beta: float, flip: float) -> None:
    # -log s(z) + log s(-z) = -z, and smoothing keeps 1 - 2 flip of it
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    loss = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=flip)
    swapped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta=beta, label_smoothing=flip)
    assert_close(loss - swapped, -(1 - 2 * flip) * beta * margin("dpo", rows), atol=1e-9, rtol=1e-9)


@given(rows=ROWS, tau=STRENGTH)
def test_ipo_swapped_mirrors_the_margin(rows: Rows, tau: float) -> None:
    # (h - t)^2 - (-h - t)^2 = -4 h t, t = 1/(2 tau)
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    loss = ipo(chosen, rejected, ref_chosen, ref_rejected, tau=tau)
    swapped = ipo(rejected, chosen, ref_rejected, ref_chosen, tau=tau)
    assert_close(loss - swapped, -2 * margin("ipo", rows) / tau, atol=1e-6, rtol=1e-9)


@given(rows=ROWS, gamma=STRENGTH)
@HINGES
def test_hinge_swapped_mirrors_the_margin(name: str, rows: Rows, gamma: float) -> None:
    # max(0, 1 - z) + max(0, 1 + z) = max(2, 1 + |z|); a hinge in nats is delta times that at z = gap/delta
    scale, strength = (1 / gamma, 1 / gamma) if name in ("slic_rank", "click") else (1.0, gamma)
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    loss = PAIR_LOSSES[name](chosen, rejected, ref_chosen, ref_rejected, strength)
    swapped = PAIR_LOSSES[name](rejected, chosen, ref_rejected, ref_chosen, strength)
    expected = scale * (1 + (gamma * margin(name, rows)).abs()).clamp(min=2)
    assert_close(loss + swapped, expected, atol=1e-9, rtol=1e-9)


@given(rows=ROWS, strength=STRENGTH, shift=st.floats(-200, 200))
@ALL
def test_shift_of_both_completions_changes_nothing(
    name: str, rows: Rows, strength: float, shift: float
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    loss = PAIR_LOSSES[name](chosen, rejected, ref_chosen, ref_rejected, strength)
    shifted = PAIR_LOSSES[name](chosen + shift, rejected + shift, ref_chosen, ref_rejected, strength)
    assert_close(shifted, loss, atol=1e-6, rtol=1e-9)


@given(rows=ROWS, strength=STRENGTH, shift=st.floats(-200, 200))
@WITH_REF
def test_shift_of_policy_and_reference_changes_nothing(
    name: str, rows: Rows, strength: float, shift: float
) -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(rows)
    loss = PAIR_LOSSES[name](chosen, rejected, ref_chosen, ref_rejected, strength)
    shifted = PAIR_LOSSES[name](chosen + shift, rejected, ref_chosen + shift, ref_rejected, strength)
    assert_close(shifted, loss, atol=1e-6, rtol=1e-9)


@given(tau=STRENGTH, off=st.floats(0.01, 100))
def test_ipo_pulls_from_both_sides_to_its_target(tau: float, off: float) -> None:
    target = 1 / (2 * tau)
    chosen, zero = at_margin([target - off, target, target + off])
    loss = ipo(chosen, zero, zero, zero, tau=tau)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert_close(loss, torch.tensor([off**2, 0.0, off**2], dtype=torch.float64), atol=1e-9, rtol=1e-9)
    assert_close(slope, torch.tensor([-2 * off, 0.0, 2 * off], dtype=torch.float64), atol=1e-9, rtol=1e-9)


@given(beta=STRENGTH, flip=st.floats(0.01, 0.49))
def test_dpo_with_smoothing_has_its_minimum_where_documented(beta: float, flip: float) -> None:
    best = math.log((1 - flip) / flip) / beta
    chosen, zero = at_margin([best - 0.1 / beta, best, best + 0.1 / beta])
    loss = dpo(chosen, zero, zero, zero, beta=beta, label_smoothing=flip)
    (slope,) = torch.autograd.grad(loss.sum(), chosen)
    assert slope[0] < 0 < slope[2]
    assert_close(slope[1].item(), 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("name", "strength", "slope"),  # all satisfied from 4 nats on
    [("hinge_norm", 0.25, -0.25), ("rso_hinge", 0.25, -0.25), ("slic_rank", 4.0, -1.0), ("click", 4.0, -1.0)],
)
def test_hinge_gradient_stops_at_the_margin(name: str, strength: float, slope: float) -> None:
    chosen, zero = at_margin([-100.0, 3.5, 4.0, 4.5, 100.0])
    loss = PAIR_LOSSES[name](chosen, zero, zero, zero, strength)
    (got,) = torch.autograd.grad(loss.sum(), chosen)
    assert got.tolist() == [slope, slope, 0.0, 0.0, 0.0]
    assert loss.tolist()[2:] == [0.0, 0.0, 0.0]


@given(rows=ROWS, delta=STRENGTH)
def test_slic_rank_is_rso_hinge_in_nats(rows: Rows, delta: float) -> None:
    chosen, rejected, _, _ = columns(rows)
    nats = delta * rso_hinge(chosen, rejected, gamma=1 / delta)
    assert_close(slic_rank(chosen, rejected, delta=delta), nats, atol=1e-9, rtol=1e-9)


@given(rows=ROWS, margin=STRENGTH)
def test_click_is_slic_rank(rows: Rows, margin: float) -> None:
    pos, neg, _, _ = columns(rows)
    assert_close(click(pos, neg, margin=margin), slic_rank(pos, neg, delta=margin), atol=0, rtol=0)


@given(rows=ROWS, gamma=STRENGTH)
def test_hinge_norm_is_rso_hinge_under_a_flat_reference(rows: Rows, gamma: float) -> None:
    chosen, rejected, flat, _ = columns(rows)
    assert_close(
        hinge_norm(chosen, rejected, flat, flat, gamma=gamma),
        rso_hinge(chosen, rejected, gamma=gamma),
        atol=1e-9,
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    ("name", "options", "values", "slopes"),  # at h = -1e4 and 1e4, strength 0.5: z = -5000, 5000
    [
        ("dpo", {}, [5e3, 0.0], [-0.5, 0.0]),
        ("dpo", {"label_smoothing": 0.1}, [4.5e3, 5e2], [-0.45, 0.05]),
        ("ipo", {}, [10001.0**2, 9999.0**2], [-20002.0, 19998.0]),
        ("hinge_norm", {}, [5001.0, 0.0], [-0.5, 0.0]),
        ("rso_hinge", {}, [5001.0, 0.0], [-0.5, 0.0]),
        ("slic_rank", {}, [10000.5, 0.0], [-1.0, 0.0]),
        ("click", {}, [10000.5, 0.0], [-1.0, 0.0]),
    ],
)
def test_far_margins_stay_exact_in_float32(
    name: str, options: dict[str, float], values: list[float], slopes: list[float]
) -> None:
    chosen, zero = at_margin([-1e4, 1e4], torch.float32)
    loss = PAIR_LOSSES[name](chosen, zero, zero, zero, 0.5, **options)
    (got,) = torch.autograd.grad(loss.sum(), chosen)
    assert_close(loss, torch.tensor(values), atol=1e-6, rtol=1e-6)
    assert_close(got, torch.tensor(slopes), atol=1e-6, rtol=1e-6)


def test_margin_keeps_its_digits_in_float32() -> None:
    # h = 0.25 - 0.0001. Chosen minus rejected first would round at 2^-12, where float32 is near 3000.
    pair = columns([(-3000.25, -0.0002, -3000.5, -0.0003)], torch.float32)
    assert_close(hinge_norm(*pair, gamma=1.0).item(), 1 - 0.2499, atol=1e-7, rtol=0)


@ALL
def test_rows_are_independent(name: str) -> None:
    rows: Rows = [(-3.0, -4.0, -2.0, -5.0), (-9.0, -2.0, -7.0, -1.0), (-6.0, -6.5, -8.0, -7.0)]
    loss = PAIR_LOSSES[name]
    assert_close(loss(*columns(rows[::-1]), 2.0), loss(*columns(rows), 2.0).flip(0))
    spoiled: Rows = [(math.nan,) * 4, *rows[1:]]
    assert_close(loss(*columns(spoiled), 2.0)[1:], loss(*columns(rows), 2.0)[1:])


# ---- Declarations ----------------------------------------------------------------------------------


@ALL
def test_declaration_agrees_with_the_signature(name: str) -> None:
    loss = PAIR_LOSSES[name]
    parameters = inspect.signature(loss.fn).parameters
    assert loss.fn.__name__ == name
    assert parameters[loss.strength].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters[loss.strength].default is inspect.Parameter.empty
    assert loss.needs_ref == ("ref_chosen_logps" in parameters)


@pytest.mark.parametrize("needs_ref", [True, False])
def test_call_passes_strength_options_and_only_a_needed_reference(needs_ref: bool) -> None:
    seen: list[Any] = []

    def fake(*tensors: Tensor, **keywords: float) -> Tensor:
        seen.extend([[t.item() for t in tensors], keywords])
        return tensors[0]

    loss = PairLoss(fake, strength="kappa", needs_ref=needs_ref, reduce="sum")
    chosen, rejected, ref_chosen, ref_rejected = torch.arange(4).unbind()
    loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, label_smoothing=0.1)
    assert seen == [[0, 1, 2, 3] if needs_ref else [0, 1], {"kappa": 0.3, "label_smoothing": 0.1}]


@ALL
def test_call_without_a_reference(name: str) -> None:
    chosen, rejected, ref_chosen, ref_rejected = columns(PAIR)
    loss = PAIR_LOSSES[name]
    if loss.needs_ref:
        with pytest.raises(ValueError, match=f"ref_chosen is None, but {name} needs"):
            loss(chosen, rejected, None, ref_rejected, 1.0)
        with pytest.raises(ValueError, match=f"ref_rejected is None, but {name} needs"):
            loss(chosen, rejected, ref_chosen, None, 1.0)
    else:
        assert_close(
            loss(chosen, rejected, None, None, 1.0), loss(chosen, rejected, ref_chosen, ref_rejected, 1.0)
        )


def test_the_losses_are_read_only() -> None:
    with pytest.raises(TypeError, match="does not support item assignment"):
        PAIR_LOSSES["dpo"] = PAIR_LOSSES["ipo"]  # type: ignore[index]


# ---- Errors ----------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("bad_shape", [(3,), (2, 1), (), (1,)])
def test_shapes_that_differ_are_named(name: str, bad_shape: tuple[int, ...]) -> None:
    loss = PAIR_LOSSES[name]
    arguments = [argument for argument in inspect.signature(loss.fn).parameters if "logps" in argument]
    assert len(arguments) == (4 if loss.needs_ref else 2)
    for position in range(1, len(arguments)):
        shapes = [bad_shape if i == position else (2,) for i in range(4)]
        chosen, rejected, ref_chosen, ref_rejected = map(torch.zeros, shapes)
        with pytest.raises(ValueError, match=r"expected one shape \(B,\)") as caught:
            loss(chosen, rejected, ref_chosen, ref_rejected, 1.0)
        assert f"{arguments[position]} has shape {bad_shape}" in str(caught.value)
        assert f"{arguments[0]} has (2,)" in str(caught.value)


@ALL
@pytest.mark.parametrize("shape", [(2, 1), ()])
def test_only_vectors_are_taken(name: str, shape: tuple[int, ...]) -> None:
    same = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"(chosen|pos)_logps has shape \(.*\), expected \(B,\)"):
        PAIR_LOSSES[name](same, same, same, same, 1.0)


@ALL
@pytest.mark.parametrize("strength", [0.0, -0.1, math.nan, math.inf])
def test_strength_is_positive_and_finite(name: str, strength: float) -> None:
    keyword = PAIR_LOSSES[name].strength
    with pytest.raises(ValueError, match=f"{keyword} is {strength}, expected a finite number above 0"):
        PAIR_LOSSES[name](*columns(PAIR), strength)


@pytest.mark.parametrize("label_smoothing", [-0.01, 0.5, 1.0, math.nan])
def test_label_smoothing_is_below_a_half(label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is {label_smoothing}, expected at least 0 and"):
        dpo(*columns(PAIR), beta=0.1, label_smoothing=label_smoothing)


def test_an_option_of_another_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="label_smoothing"):
        PAIR_LOSSES["ipo"](*columns(PAIR), 0.1, label_smoothing=0.1)
