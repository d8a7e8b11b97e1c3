"""The operations of layers with compiled functions (see `native`), for learning and for prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.layout import PackedLayout
from palate.model.fast.lean import Operations
from palate.model.fast.native import Library


class NativeOperations(Operations):
    """As `Operations`, each in one pass over memory; what the functions do not know is plain.

    Args:
        library: the functions for the network's layers.
    """

    def __init__(self, library: Library) -> None:
        self._library = library

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles of all layers as `rotated` reads them."""
        return cos.float().contiguous(), sin.float().contiguous()

    def normalised(self, x: Tensor, norm: Any) -> Tensor:
        """See `Operations`."""
        return self.added(x, None, norm)[1]

    def added(self, hidden: Tensor, change: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        out: tuple[Tensor, Tensor] = _Normalised.apply(  # type: ignore[no-untyped-call]
            hidden, change, norm.weight, norm.variance_epsilon, self._library
        )
        return out

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """See `Operations`."""
        output: Tensor = _Rotated.apply(x, cos, sin, self._library)  # type: ignore[no-untyped-call]
        return output

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Operations`."""
        output: Tensor = _Gated.apply(gate, up, self._library)  # type: ignore[no-untyped-call]
        return output

    def attend(
        self, layout: Layout, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention
    ) -> Tensor:
        """See `Operations`."""
        assert isinstance(layout, PackedLayout), "steps have functions of their own"
        layout.keep(layer, key, value)
        output: Tensor = _Attended.apply(  # type: ignore[no-untyped-call]
            query, key, value, layout.numbers, len(layout.records), how, self._library
        )
        return output


class _Normalised(torch.autograd.Function):
    """hidden + change, and its RMS norm; see `lean._Normalised`. Without a change the sum is `hidden`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float, library: Library
    ) -> tuple[Tensor, Tensor]:
        size = hidden.shape[-1]
        hidden = library.checked(hidden)
        change = None if change is None else library.checked(change)
        total = hidden if change is None else torch.empty_like(hidden)
        out = torch.empty_like(hidden)
        factors = hidden.new_empty(hidden.numel() // size, dtype=torch.float32)
        library.normalise(hidden, change, total, weight, out, factors, len(factors), size, eps)
        ctx.save_for_backward(total, weight, factors)
        ctx.library, ctx.adds = library, change is not None
        ctx.set_materialize_grads(False)
        return (total if ctx.adds else hidden.detach()), out

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, d_out: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, factors = ctx.saved_tensors
        d_x = torch.empty_like(total)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        ctx.library.normalise_back(
            total,
            weight,
            factors,
            ctx.library.checked(d_out),
            None if d_total is None else ctx.library.checked(d_total),
            d_x,
            d_weight,
            len(factors),
            total.shape[-1],
        )
        of_weight = None if d_weight is None else d_weight.to(weight.dtype)
        return d_x, d_x if ctx.adds else None, of_weight, None, None


class _Rotated(torch.autograd.Function):
    """See `lean._Rotated`. x (B, T, heads, D)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, library: Library) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.library = library
        return _turned(x, cos, sin, 1.0, library)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(d_out, cos, sin, -1.0, ctx.library), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float, library: Library) -> Tensor:
    x = library.checked(x)
    out = torch.empty_like(x)
    _, _, heads, size = x.shape
    assert size == library.kind.size == cos.shape[-1], "other heads than the functions were compiled for"
    library.rotate(x, heads * size, cos, sin, sign, out, x.numel() // (heads * size), heads)
    return out


class _Gated(torch.autograd.Function):
    """silu(gate) * up; saves only its two arguments."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, library: Library) -> Tensor:
        gate, up = library.checked(gate), library.checked(up)
        ctx.save_for_backward(gate, up)
        ctx.library = library
        out = torch.empty_like(gate)
        size = gate.shape[-1]
        library.gate(gate, up, size, out, gate.numel() // size, size)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        ctx.library.gate_back(gate, up, ctx.library.checked(d_out), d_gate, d_up, gate.numel())
        return d_gate, d_up, None


class _Attended(torch.autograd.Function):
    """The attention of a packed row; backward computes the weights again. Tensors (1, L, heads, D)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        numbers: Tensor,
        count: int,
        how: Attention,
        library: Library,
    ) -> Tensor:
        query, key, value = (library.checked(part) for part in (query, key, value))
        out = torch.empty_like(query)
        normalisers = query.new_empty(query.shape[1:3], dtype=torch.float32)
        ctx.options = numbers, count, how.scaling, how.window or 0
        library.attend_row(query, key, value, *ctx.options, out, normalisers)
        ctx.save_for_backward(query, key, value, out, normalisers)
        ctx.library = library
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, normalisers = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in (query, key, value)]
        ctx.library.attend_row_back(
            query, key, value, out, ctx.library.checked(d_out), normalisers, *ctx.options, *gradients
        )
        return *gradients, None, None, None, None
