from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from palate.model.fast.head import LMHead
from palate.model.heads import HeadValues

WIDTH, VOCABULARY, TOKENS = 5, 11, 20

EVERY_HEAD = [
    pytest.mark.parametrize("softcap", [None, 2.0], ids=["", "soft cap"]),
    pytest.mark.parametrize("bias", [False, True], ids=["", "bias"]),
    pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"]),
]


def every_head(test: Callable) -> Callable:
    for mark in EVERY_HEAD:
        test = mark(test)
    return test


def inputs(dtype: torch.dtype, *, trained: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, which always pass gradient on, weight, bias, and targets."""
    noise = torch.Generator().manual_seed(0)
    sizes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
    hidden, weight, bias = (torch.randn(size, generator=noise).to(dtype) for size in sizes)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=noise)
    return hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained), targets


def weighed(found: HeadValues, parts: str = "logps logits top_logits") -> Tensor:
    """A number whose gradient tells every entry of some outputs from every other."""
    noise = torch.Generator().manual_seed(1)
    weights = {n: torch.randn(getattr(found, n).shape, generator=noise) for n in HeadValues._fields}
    return sum((getattr(found, name) * weights[name]).sum() for name in parts.split())


@every_head
@pytest.mark.parametrize("tile", [1, 7, 100], ids=lambda t: f"{t} tokens")
@pytest.mark.parametrize(
    "parts", ["logps", "logits", "top_logits", "logps logits top_logits"], ids=lambda p: p.replace(" ", "+")
)
def test_tiles_are_plain_operations_on_all_logits(
    parts: str, tile: int, trained: bool, bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.model.fast.head.TILE_BYTES", 4 * tile * VOCABULARY)
    *ours, targets = inputs(torch.float32, trained=trained)
    head = LMHead(ours[1], ours[2] if bias else None, softcap)
    got = head.values(ours[0], targets, statistics=True, top_logits=3)
    weighed(got, parts).backward()
    *exact, _ = inputs(torch.float64, trained=trained)
    full = LMHead(exact[1], exact[2] if bias else None, softcap).logits(exact[0])
    table, best = full.log_softmax(-1), full.topk(3)
    expected = HeadValues(
        table.gather(-1, targets[:, None])[:, 0],
        -(table.exp() * table).sum(-1),
        (full.argmax(-1) == targets).double(),
        full.gather(-1, targets[:, None])[:, 0],
        best.values,
        best.indices,
    )
    weighed(expected, parts).backward()
    for ours_, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_.double(), theirs.double(), atol=1e-5, rtol=1e-5)
    assert [value.requires_grad for value in got] == [True, False, False, True, True, False]
    for leaf, other in zip(ours, exact, strict=True):
        assert (leaf.grad is None) == (other.grad is None)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, atol=1e-5, rtol=1e-5)


@every_head
def test_derivatives_are_those_of_finite_differences(
    trained: bool, bias: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.model.fast.head.TILE_BYTES", 4 * 7 * VOCABULARY)
    hidden, weight, offset, targets = inputs(torch.float64, trained=trained)

    def values(hidden: Tensor, weight: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
        head = LMHead(weight, offset if bias else None, softcap)
        found = head.values(hidden, targets, statistics=True, top_logits=3)
        return found.logps, found.logits, found.top_logits

    assert torch.autograd.gradcheck(values, (hidden, weight, offset))


def test_by_hand() -> None:
    # Logits (2, 0, 1) after h = (2, 1) and W = (1, 0), (0, 0), (0, 1); the target is the last token.
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    hidden = torch.tensor([[2.0, 1.0]], requires_grad=True)
    found = LMHead(weight, None, None).values(hidden, torch.tensor([2]), statistics=True, top_logits=2)
    # e^2 + 1 + e = 11.107338, log 2.407606
    assert found.logps.tolist() == pytest.approx([1 - 2.407606], abs=1e-6)
    assert found.logits.tolist() == [1.0]
    assert found.top_logits.tolist() == [[2.0, 1.0]]
    assert found.top_tokens.tolist() == [[0, 2]]
    # The derivative of a logit is its row of W: 3 x row 2 + 5 x row 0 + 7 x row 2.
    (3 * found.logits.sum() + (found.top_logits * torch.tensor([5.0, 7.0])).sum()).backward()
    assert hidden.grad.tolist() == [[5.0, 10.0]]


def test_a_soft_cap_flattens_the_slope() -> None:
    # One logit, raw 2, cap 2: 2 tanh(1) = 1.523188, slope 1 - tanh(1)^2 = 0.419974.
    hidden = torch.tensor([[2.0]], requires_grad=True)
    head = LMHead(torch.tensor([[1.0], [0.0]]), None, 2.0)
    found = head.values(hidden, torch.tensor([1]), top_logits=1)
    assert found.top_logits.item() == pytest.approx(1.523188, abs=1e-6)
    found.top_logits.sum().backward()
    assert hidden.grad.item() == pytest.approx(0.419974, abs=1e-6)


def test_no_more_logits_than_there_are_tokens() -> None:
    hidden, weight, bias, targets = inputs(torch.float32, trained=False)
    found = LMHead(weight, bias, None).values(hidden, targets, top_logits=VOCABULARY + 5)
    assert found.top_logits.shape == (TOKENS, VOCABULARY)
    torch.testing.assert_close(found.top_logits, hidden.matmul(weight.T).add(bias).sort(descending=True)[0])


def test_logps_are_the_first_three_values() -> None:
    hidden, weight, bias, targets = inputs(torch.float32, trained=False)
    head = LMHead(weight, bias, None)
    few, all_of_them = (
        head.logps(hidden, targets, statistics=True),
        head.values(hidden, targets, statistics=True, top_logits=2),
    )
    assert all(map(torch.equal, few, all_of_them[:3]))
    assert (head.values(hidden, targets).entropy == 0).all()
    assert head.values(hidden, targets).top_logits.shape == (TOKENS, 0)


@every_head
def test_half_precision_rounds_and_no_more(trained: bool, bias: bool, softcap: float | None) -> None:
    gradients = []
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight, offset, targets = inputs(torch.bfloat16, trained=trained)
        leaves = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (hidden, weight, offset)]
        head = LMHead(leaves[1], leaves[2] if bias else None, softcap)
        found = head.values(leaves[0], targets, top_logits=1)
        assert found.logits.dtype == found.top_logits.dtype == found.logps.dtype == torch.float32
        (found.logits - found.logps).sum().backward()
        assert leaves[0].grad.dtype == dtype
        gradients.append([leaf.grad.float() for leaf in leaves if leaf.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.05 * float(theirs.abs().max()), rtol=0)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor has which is made meanwhile."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_no_more_than_a_tile_of_logits_is_ever_held(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, bias, targets = inputs(torch.float32, trained=trained)
    monkeypatch.setattr("palate.model.fast.head.TILE_BYTES", 4 * 4 * VOCABULARY)
    rest = max(hidden.numel(), weight.numel(), TOKENS * 4)
    kept: list[Tensor] = []
    with (
        Largest() as seen,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        found = LMHead(weight, bias, 2.0).values(hidden, targets, statistics=True, top_logits=3)
        weighed(found).backward()
    assert seen.numbers <= max(4 * VOCABULARY, rest) < TOKENS * VOCABULARY
    assert kept
    assert max(t.numel() for t in kept) <= rest
