"""The operations of layers with compiled functions (see `native`), for learning and for prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.layout import PackedLayout
from palate.model.fast.native import Library
from palate.model.fast.operations import Operations

PANEL = 32
"""Products with matrix units have whole panels of so many rows and columns."""


class NativeOperations(Operations):
    """As `Operations`, each in one pass over memory.

    Args:
        library: the functions for the network's layers.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._has_tiles = bool(library.has_tiles())

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles of all layers as `rotate` reads them."""
        return cos.float().contiguous(), sin.float().contiguous()

    def norm(
        self, hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operations`. The factors are (...)."""
        size = hidden.shape[-1]
        hidden = self._library.checked(hidden)
        change = None if change is None else self._library.checked(change)
        total = hidden if change is None else torch.empty_like(hidden)
        out = torch.empty_like(hidden)
        factors = hidden.new_empty(hidden.numel() // size, dtype=torch.float32)
        self._library.normalise(hidden, change, total, weight, out, factors, len(factors), size, eps)
        return total, out, factors

    def norm_back(
        self,
        total: Tensor,
        weight: Tensor,
        factors: Tensor,
        d_out: Tensor,
        d_total: Tensor | None,
        *,
        of_weight: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Operations`."""
        d_x = torch.empty_like(total)
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        d_out = self._library.checked(d_out)
        d_total = None if d_total is None else self._library.checked(d_total)
        size = total.shape[-1]
        self._library.normalise_back(
            total, weight, factors, d_out, d_total, d_x, d_weight, len(factors), size
        )
        return d_x, None if d_weight is None else d_weight.to(weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        """See `Operations`."""
        x = self._library.checked(x)
        out = torch.empty_like(x)
        _, _, heads, size = x.shape
        kind = self._library.kind
        assert size == kind.size == cos.shape[-1], "other heads than the functions were compiled for"
        step = heads * size
        self._library.rotate(x, step, cos, sin, float(sign), out, x.numel() // step, heads)
        return out

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `Operations`."""
        gate, up = self._library.checked(gate), self._library.checked(up)
        out = torch.empty_like(gate)
        size = gate.shape[-1]
        self._library.gate(gate, up, size, out, gate.numel() // size, size)
        return out

    def gate_back(self, gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """See `Operations`."""
        gate, up, d_out = (self._library.checked(part) for part in (gate, up, d_out))
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        self._library.gate_back(gate, up, d_out, d_gate, d_up, gate.numel())
        return d_gate, d_up

    def weight_gradient(self, d_out: Tensor, x: Tensor) -> Tensor:
        """See `Operations`. torch reads a transposed matrix slowly, and uses one thread for small weights."""
        outputs, inputs = d_out.shape[1], x.shape[1]
        if not self._has_tiles or outputs % PANEL or inputs % PANEL or not len(x):
            return super().weight_gradient(d_out, x)
        out = d_out.new_empty(outputs, inputs)
        d_out, x = self._library.checked(d_out), self._library.checked(x)
        self._library.weight_gradient(d_out, x, out, len(x), outputs, inputs)
        return out

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
