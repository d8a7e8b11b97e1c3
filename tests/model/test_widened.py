"""Products of bfloat16 in float32: exactly those of float64, rounded once, and none left out."""

import copy
import functools
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from palate.config import Sampling
from palate.learn import Pairwise
from palate.losses import PAIR_LOSSES
from palate.model import widened
from palate.model.fast.head import LMHead
from palate.model.widened import FEW_ROWS, INSTEAD, widening
from palate.testing import KINDS, tiny_model, tiny_policy
from palate.types import Comparison, Prompt

# Asked by peft of a network with activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


@pytest.fixture
def without_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has no units for bfloat16, whatever this one has."""
    monkeypatch.setattr(widened, "lacks_units", lambda device: device.type == "cpu")


@pytest.fixture
def mode(without_units: None) -> Iterator[None]:
    with widening(torch.nn.Linear(1, 1, dtype=torch.bfloat16)):
        yield


def whole(*sizes: int, seed: int = 0) -> Tensor:
    """Whole numbers from -2 to 2: sums of a few of their products are exact in bfloat16 as well."""
    return torch.randint(-2, 3, sizes, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def exact(func: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """In float64, rounded to bfloat16 at the end."""

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    found = func(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
    return found.to(torch.bfloat16)


def test_a_product_by_hand(mode: None) -> None:
    # 1 * 3 + 2 * 4 + 1 = 12 and 1 * 5 + 2 * 6 - 1 = 16.
    x, weight = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    found = linear(x.bfloat16(), weight.bfloat16(), torch.tensor([1.0, -1.0]).bfloat16())
    assert torch.equal(found, torch.tensor([12.0, 16.0]).bfloat16())


def test_sums_are_rounded_once(mode: None) -> None:
    # Next to 256 bfloat16 knows nothing below 2: added one by one, the ones would all be lost.
    x = torch.tensor([[256.0, *[1.0] * 16]]).bfloat16()
    assert linear(x, torch.ones(1, 17).bfloat16()).item() == 272.0


@pytest.mark.parametrize("block", [7, 40, 1 << 21], ids=["rows alone", "a few rows", "whole"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (FEW_ROWS + 1,), (1,), ()], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_values_and_gradients_are_exact(
    block: int,
    rows: tuple[int, ...],
    bias: bool,
    trained: tuple[bool, bool],
    mode: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(widened, "BLOCK_ELEMENTS", block)
    monkeypatch.setattr(widened, "_buffers", type("Own", (), {})())
    x, weight, offset = whole(*rows, 8), whole(11, 8, seed=1), whole(11, seed=2) if bias else None
    of_x, of_weight = trained
    wanted: list[Tensor] = []
    for convert in (torch.Tensor.bfloat16, torch.Tensor.double):
        leaves = [convert(t.clone()) for t in (x, weight, offset) if t is not None]
        for leaf, graded in zip(leaves, (of_x, of_weight, of_weight), strict=False):
            leaf.requires_grad_(graded)
        out = linear(*leaves)
        assert out.is_contiguous()
        assert out.shape == (*rows, 11)
        if of_x or of_weight:
            # Of what is asked a few entries alone, so that sums over rows stay exact.
            asked = torch.zeros_like(out)
            asked.view(-1, 11)[:3] = 1
            out.backward(asked)
        found = [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
        assert len(found) == 1 + of_x + of_weight * (1 + bias)
        wanted = wanted or found
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(wanted, found, strict=True))


def test_a_product_may_be_added_to_in_place(mode: None) -> None:
    # As adapters are: autograd forbids it of a view that a function returns.
    x, up = whole(3, 8).requires_grad_(), whole(5, 2, seed=1).requires_grad_()
    low = whole(3, 2, seed=2)
    out = linear(x, whole(5, 8, seed=3)).addmm_(low, up.t(), alpha=2.0)
    assert torch.equal(out, exact(lambda a, b, c, d: a @ b.T + 2 * c @ d.T, x, whole(5, 8, seed=3), low, up))
    out.sum().backward()
    assert torch.equal(up.grad, (2 * low.double().sum(0)).expand(5, 2).bfloat16())


PAIR, BATCHED = ((3, 4), (4, 5)), ((2, 3, 4), (2, 4, 5))
CASES: dict[str, tuple[Any, tuple[tuple[int, ...], ...]]] = {
    "torch.matmul": (torch.matmul, BATCHED),
    "torch.mm": (torch.mm, PAIR),
    "torch.bmm": (torch.bmm, BATCHED),
    "torch.addmm": (torch.addmm, ((3, 5), *PAIR)),
    "torch.baddbmm": (torch.baddbmm, ((2, 3, 5), *BATCHED)),
    "Tensor.matmul": (Tensor.matmul, PAIR),
    "Tensor.mm": (Tensor.mm, PAIR),
    "Tensor.bmm": (Tensor.bmm, BATCHED),
    "Tensor.addmm": (Tensor.addmm, ((3, 5), *PAIR)),
    "Tensor.baddbmm": (Tensor.baddbmm, ((2, 3, 5), *BATCHED)),
    "Tensor.addmm_": (Tensor.addmm_, ((3, 5), *PAIR)),
    "Tensor.baddbmm_": (Tensor.baddbmm_, ((2, 3, 5), *BATCHED)),
    "linear": (linear, ((3, 4), (5, 4))),
    "attention": (scaled_dot_product_attention, ((1, 2, 6, 8),) * 3),
}


def test_every_operation_has_a_case() -> None:
    assert {func for func, _ in CASES.values()} == set(INSTEAD)


@pytest.mark.parametrize("name", CASES)
def test_operations_that_others_write(name: str, without_units: None) -> None:
    func, sizes = CASES[name]
    given = [whole(*size, seed=i) for i, size in enumerate(sizes)]
    wanted = exact(func, *(t.clone() for t in given))
    with Narrow() as natively:
        func(*(t.clone() for t in given))
    assert natively.found
    with Narrow() as narrow, widening(torch.nn.Linear(1, 1, dtype=torch.bfloat16)):
        found = func(*given)
    assert not narrow.found
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.02 if name == "attention" else 0)
    assert (found is given[0]) == name.endswith("_")


PRODUCTS = (
    *("mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "mkldnn_linear"),
    *("convolution", "_grouped_mm"),
)


class Narrow(TorchDispatchMode):
    """Notes the products that are computed of bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS or "attention" in name:
            self.found += [name for t in args if isinstance(t, Tensor) and t.dtype == torch.bfloat16][:1]
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @functools.cache
    def made(kind: str) -> Path:
        """Wide enough a start for layers to matter."""
        return Path(tiny_model(tmp_path_factory.mktemp(kind), kind=kind, initializer_range=0.1))

    return made


WAYS = {
    "lora": {"lora": True},
    "full": {"lora": False},
    "checkpointing": {"lora": False, "checkpointing": True},
    "plain": {"lora": True, "fast": False},
    "plain checkpointing": {"lora": True, "fast": False, "checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_product_of_a_step_is_left_in_bfloat16(
    kind: str, way: str, directory_of: Callable[[str], Path], without_units: None
) -> None:
    policy = tiny_policy(directory_of(kind), dtype="bfloat16", model=WAYS[way])
    ref = policy.snapshot()
    pairs = [policy.model.codec.pair(Comparison(Prompt(q), "yes", "no, never")) for q in ("a", "bc")]
    with Narrow() as narrow:
        ref.sample([Prompt("a"), Prompt("Longer?")], 2, Sampling(max_new_tokens=3), seed=0)
        metrics = policy.update(pairs, Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=ref))
    assert metrics["grad_norm"] > 0
    assert metrics["loss"] == float(np.float32(math.log(2)))  # policy and reference are alike to the last bit
    assert not narrow.found


def test_the_oracle_sees_a_product_that_is_left(
    directory_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # With units for bfloat16 everything is computed in it, backward too: the test above can fail.
    monkeypatch.setattr(widened, "lacks_units", lambda device: False)
    policy = tiny_policy(directory_of("llama"), dtype="bfloat16", model=WAYS["full"])
    pair = policy.model.codec.pair(Comparison(Prompt("a"), "yes", "no"))
    objective = Pairwise(PAIR_LOSSES["slic_rank"], strength=5.0)
    with Narrow() as narrow:
        policy.logps([pair])
    forward = len(narrow.found)
    with Narrow() as narrow:
        policy.update([pair], objective)
    assert len(narrow.found) > 2 * forward > 0


@pytest.mark.parametrize("way", ["lora", "full", "plain"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_numbers_are_as_near_to_float32s_as_with_units(
    kind: str, way: str, directory_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logps(dtype: str, *, units: bool) -> Tensor:
        monkeypatch.setattr(widened, "lacks_units", lambda device: not units)
        policy = tiny_policy(directory_of(kind), dtype=dtype, model=WAYS[way])
        for parameter in policy.model.network.parameters():  # the same weights in both formats
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
        pairs = [policy.model.codec.pair(Comparison(Prompt(q), q * 40, "no")) for q in ("a", "bc")]
        return policy.logps(pairs).values

    wanted = logps("float32", units=True)
    ours, theirs = (float((logps("bfloat16", units=u) - wanted).abs().mean()) for u in (False, True))
    assert ours <= 1.1 * theirs
    assert ours < 0.02


@pytest.mark.parametrize("units", [True, False])
def test_only_bfloat16_on_an_x86_processor_without_units_is_widened(
    units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = (torch.ones(1, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    monkeypatch.setattr(widened, "has_bfloat16", lambda device: units)
    monkeypatch.setattr("platform.machine", lambda: "AMD64")
    assert widened.widens(narrow) == (not units)
    assert not widened.widens(wide)
    assert not widened.widens(narrow.to("meta"))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not widened.widens(narrow)


def test_what_asks_for_its_own_result_is_left_alone(mode: None) -> None:
    x, weight = whole(3, 4), whole(4, 5, seed=1)
    into = torch.zeros(3, 5, dtype=torch.bfloat16)
    assert torch.mm(x, weight, out=into) is into
    assert torch.equal(into, exact(torch.mm, x, weight))
    with pytest.raises(RuntimeError):  # as without the mode
        linear(x, whole(5, 4, seed=1).float())
    assert torch.equal(linear(x, whole(4, seed=2)), exact(linear, x, whole(4, seed=2)))


def test_the_buffer_serves_whoever_comes_later(mode: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "_buffers", type("Own", (), {})())
    x, weight = whole(3, 4), whole(5, 4, seed=1).requires_grad_()
    with torch.inference_mode():
        first = linear(x, weight)
    head = LMHead(weight, None, None)
    assert torch.equal(first, linear(x, weight).detach())
    assert torch.equal(first.float(), head.logits(x).detach())
    assert not widened._buffers.kept.requires_grad
    assert torch.equal(first, linear(x, weight).detach())


@pytest.mark.parametrize("trained", [(True, False), (False, True)], ids=["input", "weight"])
def test_no_more_is_kept_for_backward_than_it_needs(trained: tuple[bool, bool], mode: None) -> None:
    x, weight = (
        t.requires_grad_(graded) for t, graded in zip((whole(3, 4), whole(5, 4)), trained, strict=True)
    )
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight)
    assert [t.data_ptr() for t in kept] == [(weight if trained[0] else x).data_ptr()]


def test_a_trained_head(without_units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palate.model.fast.head.TILE_ELEMENTS", 40)
    made = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [whole(9, 4), whole(11, 4, seed=1), whole(11, seed=2)]
        hidden, weight, bias = (t.to(dtype).requires_grad_() for t in leaves)
        found = LMHead(weight, bias, 3.0).values(hidden, torch.arange(9), top_logits=2)
        (found.logps.sum() + found.top_logits.sum()).backward()
        made.append([found.logps.detach(), *(leaf.grad for leaf in (hidden, weight, bias))])
    for ours, wanted in zip(*made, strict=True):
        close = 1e-5 if ours.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(
            ours.double(), wanted.double(), rtol=close, atol=close * float(wanted.abs().max())
        )


def test_a_copy_is_freed_at_once(directory_of: Callable[[str], Path], without_units: None) -> None:
    # A cycle would keep a full copy of the weights until the garbage collector comes by.
    policy = tiny_policy(directory_of("llama"), dtype="bfloat16", model=WAYS["checkpointing"])
    gc.disable()
    try:
        copied = copy.deepcopy(policy.model.network)
        alive = weakref.ref(copied)
        del copied
        assert alive() is None
    finally:
        gc.enable()
