"""Compiled passes over gradients and weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from palate.config import OptimConfig
from palate.learn import Optimizer, Policy
from palate.model.compiling import obstacle
from palate.model.fast.native import Kind, Library
from palate.model.fast.native_passes import NativePasses
from palate.model.passes import Passes

pytestmark = pytest.mark.skipif(bool(obstacle(torch.device("cpu"))), reason="there is no C++ compiler")

FORMATS = [torch.float32, torch.bfloat16]
COUNTS = (0, 1, 15, 33, 1000, (1 << 14) + 7, 3 * (1 << 14))
PLACES = (0, 1, 4, 31)
"""Numbers before the tensor in its memory, so that lines of a cache begin within it."""


def passes(dtype: torch.dtype) -> NativePasses:
    return NativePasses(Library(Kind(dtype, 2, 1, 32)))


def placed(values: Tensor, place: int) -> Tensor:
    """The values as a part of a larger piece of memory."""
    return torch.cat((values.new_full((place,), 7.0), values, values.new_full((9,), 7.0)))[place:-9]


def around(part: Tensor) -> Tensor:
    """The numbers before and after such a part."""
    base = part._base
    assert base is not None
    return torch.cat((base[: part.storage_offset()], base[part.storage_offset() + part.numel() :]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", FORMATS)
def test_sums_and_rounded_weights_are_exactly_those_of_torch(dtype: torch.dtype, place: int) -> None:
    native, source = passes(dtype), torch.Generator().manual_seed(0)
    for count in COUNTS:
        gradient, total = (torch.randn(count, generator=source) for _ in range(2))
        gradient, ours = placed(gradient.to(dtype), place), placed(total, place)
        native.add(gradient, ours)
        assert torch.equal(ours, total + gradient.float())
        out = placed(torch.zeros(count, dtype=dtype), place)
        native.narrow(total, out)
        assert torch.equal(out, total.to(dtype))
        assert (around(ours) == 7).all()
        assert (around(out) == 7).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_numbers_at_the_ends_of_the_format(dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, -3.4e38, 1.00390625, 1.01171875, 1e-3] * 8)
    out = torch.zeros(len(ends), dtype=dtype)
    passes(dtype).narrow(ends, out)
    assert torch.equal(out, ends.to(dtype))
    ends[5] = torch.nan
    passes(dtype).narrow(ends, out)
    assert out[5].isnan()


@pytest.mark.parametrize("value", [1e-39, -1e-39, torch.nan])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_number_does_not_depend_on_its_place(dtype: torch.dtype, value: float) -> None:
    """Instructions for bfloat16 turn the smallest numbers into zero: then all of them."""
    out = placed(torch.zeros(101, dtype=dtype), 3)
    passes(dtype).narrow(torch.full((101,), value), out)
    integers = out.contiguous().view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    assert (integers == integers[0]).all()


def test_a_norm_is_that_of_float64() -> None:
    native, source = passes(torch.bfloat16), torch.Generator().manual_seed(0)
    parts = [torch.randn(count, generator=source) for count in COUNTS]
    exact = math.sqrt(sum(float(part.double().square().sum()) for part in parts))
    assert float(native.norm(parts)) == pytest.approx(exact, rel=1e-6)
    large = [torch.full((1 << 20,), 0.1)] * 40
    assert float(native.norm(large)) == pytest.approx(math.sqrt(40 * 2**20) * float(large[0][0]), rel=1e-6)
    assert float(native.norm([])) == 0.0


@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 16, 999])
def test_a_norm_with_a_fault_is_not_finite(fault: float, place: int) -> None:
    part = torch.ones(1000)
    part[place] = fault
    assert not passes(torch.bfloat16).norm([torch.ones(3), part]).isfinite()


def test_other_tensors_are_those_of_torch() -> None:
    native = passes(torch.bfloat16)
    matrix = torch.arange(12.0).view(3, 4)
    for gradient, total in (
        (matrix.t().bfloat16(), torch.ones(4, 3)),  # in another order
        (matrix, torch.ones(3, 4)),  # in another format
        (matrix.bfloat16(), torch.ones(3, 4).bfloat16()),
        (matrix.bfloat16(), torch.ones(3, 4).double()),
    ):
        expected = gradient.to(total.dtype) + total
        native.add(gradient, total)
        assert torch.equal(total, expected)
        out = torch.zeros_like(gradient)
        native.narrow(total, out)
        assert torch.equal(out, total.to(out.dtype))
    for part in (matrix.bfloat16(), matrix.double(), matrix.t()):
        assert float(native.norm([part, part])) == pytest.approx(math.sqrt(2 * 506), rel=1e-2)


def test_an_odd_address_is_left_to_torch() -> None:
    memory = bytearray(2 * 65)
    out = torch.frombuffer(memoryview(memory)[1:-1], dtype=torch.bfloat16)
    passes(torch.bfloat16).narrow(torch.arange(64.0), out)
    assert torch.equal(out, torch.arange(64.0).bfloat16())


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({"compile": "on"}, NativePasses),
        ({"compile": "off"}, Passes),
        ({"compile": "on", "fast": False}, Passes),
    ],
)
def test_a_learner_uses_what_its_model_uses(
    options: dict[str, Any], computed: type, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(**options)
    assert type(policy.model.passes()) is computed
    assert type(policy.optimizer._passes) is computed


def test_changed_weights_are_seen_by_autograd() -> None:
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    product = (weight * weight).sum()
    with torch.no_grad():
        passes(torch.bfloat16).narrow(torch.zeros(4), weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()  # type: ignore[no-untyped-call]


def test_an_optimizer_takes_the_same_steps() -> None:
    trained = []
    for computed in (Passes(), passes(torch.bfloat16)):
        source = torch.Generator().manual_seed(0)
        made = [
            (name, nn.Parameter(torch.randn(shape, generator=source).bfloat16()))
            for name, shape in {"matrix": (40, 33), "bias": (7,), "head": (130, 140)}.items()
        ]
        cfg = OptimConfig(lr=0.1, weight_decay=0.1, max_grad_norm=2.0)
        optimizer = Optimizer(made, cfg, total_steps=9, passes=computed)
        norms = []
        for _ in range(4):
            for _ in range(3):  # micro-batches
                slopes = [torch.randn(p.shape, generator=source) for _, p in made]
                sum((p.float() * s).sum() for (_, p), s in zip(made, slopes, strict=True)).backward()  # type: ignore[union-attr]
            norms.append(optimizer.step())
        trained.append((norms, optimizer.state(), [p.detach() for _, p in made]))
    (norms, state, weights), (other_norms, other_state, other_weights) = trained
    assert norms == pytest.approx(other_norms, rel=1e-5)
    for name, value in state.items():
        torch.testing.assert_close(other_state[name], value)
    for ours, theirs in zip(other_weights, weights, strict=True):
        torch.testing.assert_close(ours, theirs)
