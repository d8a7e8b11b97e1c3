"""The operations of layers with compiled functions (see `native`), for learning and for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.layout import PackedLayout
from palate.model.fast.native import PANEL, Library
from palate.model.fast.operations import Operations


class NativeOperations(Operations):
    """As `Operations`, each in one pass over memory.

    Attributes:
        library: the functions for the network's layers.
    """

    def __init__(self, library: Library) -> None:
        self.library = library
        self._has_tiles = bool(library.has_tiles())

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles of all layers as `rotate` reads them."""
        return cos.float().contiguous(), sin.float().contiguous()

    def norm(
        self, hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operations`. The factors are (...)."""
        size = hidden.shape[-1]
        hidden = self.library.checked(hidden)
        change = None if change is None else self.library.checked(change)
        total = hidden if change is None else torch.empty_like(hidden)
        out = torch.empty_like(hidden)
        factors = hidden.new_empty(hidden.numel() // size, dtype=torch.float32)
        self.library.normalise(hidden, change, total, weight, out, factors, len(factors), size, eps)
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
        d_out = self.library.checked(d_out)
        d_total = None if d_total is None else self.library.checked(d_total)
        size = total.shape[-1]
        self.library.normalise_back(total, weight, factors, d_out, d_total, d_x, d_weight, len(factors), size)
        return d_x, None if d_weight is None else d_weight.to(weight.dtype)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int, *, out: Tensor | None = None) -> Tensor:
        """See `Operations`. out: for the result; may be x."""
        x = self.library.checked(x)
        out = torch.empty_like(x) if out is None else out
        _, _, heads, size = x.shape
        kind = self.library.kind
        assert size == kind.size == cos.shape[-1], "other heads than the functions were compiled for"
        step = heads * size
        self.library.rotate(x, step, cos, sin, float(sign), out, x.numel() // step, heads)
        return out

    def gate(self, gate: Tensor, up: Tensor, *, keep: bool = True) -> Tensor:
        """See `Operations`."""
        gate, up = self.library.checked(gate), self.library.checked(up)
        out = torch.empty_like(gate) if keep else gate
        size = gate.shape[-1]
        self.library.gate(gate, up, size, out, gate.numel() // size, size)
        return out

    def gate_back(
        self, gate: Tensor, up: Tensor, d_out: Tensor, *, keep: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Operations`."""
        gate, up, d_out = (self.library.checked(part) for part in (gate, up, d_out))
        out, d_gate, d_up = (torch.empty_like(gate) for _ in range(3)) if keep else (d_out, gate, up)
        self.library.gate_back(gate, up, d_out, out, d_gate, d_up, gate.numel())
        if not keep:
            for part in (gate, up):
                increment_version(part)  # another backward with these values is an error
        return out, d_gate, d_up

    def weight_gradients(self, slopes: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """See `Operations`. torch reads a transposed matrix slowly, and uses one thread for small weights."""
        tokens, inputs = x.shape
        assert all(len(slope) == tokens for slope in slopes), "gradients and arguments of different tokens"
        sizes = [slope.shape[1] for slope in slopes]
        if not (self._has_tiles and slopes and x.numel()) or any(size % PANEL for size in (*sizes, inputs)):
            return super().weight_gradients(slopes, x)
        slopes, x = [self.library.checked(slope) for slope in slopes], self.library.checked(x)
        gradients = [x.new_empty(size, inputs) for size in sizes]
        parts = [
            [slope.data_ptr(), out.data_ptr(), size]
            for slope, out, size in zip(slopes, gradients, sizes, strict=True)
        ]
        table = torch.tensor(parts, device="cpu")
        self.library.weight_gradients(table, len(parts), x, tokens, inputs)
        return gradients

    def attend(
        self,
        layout: Layout,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        how: Attention,
        angles: tuple[Tensor, Tensor],
    ) -> Tensor:
        """See `Operations`."""
        assert isinstance(layout, PackedLayout), "steps have functions of their own"
        output, key = _Attended.apply(  # type: ignore[no-untyped-call]
            query, key, value, layout.numbers, len(layout.records), how, angles, self
        )
        layout.keep(layer, key, value)
        attended: Tensor = output
        return attended


class _Attended(torch.autograd.Function):
    """The attention of a packed row, and its rotated keys; backward computes the weights again.

    Tensors (1, L, heads, D).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        numbers: Tensor,
        count: int,
        how: Attention,
        angles: tuple[Tensor, Tensor],
        operations: NativeOperations,
    ) -> tuple[Tensor, Tensor]:
        library = ctx.library = operations.library
        query, key = (operations.rotate(part, *angles, 1) for part in (query, key))
        value = library.checked(value)
        out = torch.empty_like(query)
        normalisers = query.new_empty(query.shape[1:3], dtype=torch.float32)
        ctx.options = numbers, count, how.scaling, how.window or 0
        library.attend_row(query, key, value, *ctx.options, out, normalisers)
        ctx.save_for_backward(query, key, value, out, normalisers, *angles)
        ctx.operations = operations
        ctx.mark_non_differentiable(key)
        ctx.set_materialize_grads(False)
        return out, key

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, _key: None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,) * 8
        query, key, value, out, normalisers, *angles = ctx.saved_tensors
        gradients = [torch.empty_like(part) for part in (query, key, value)]
        ctx.library.attend_row_back(
            query, key, value, out, ctx.library.checked(d_out), normalisers, *ctx.options, *gradients
        )
        for part in gradients[:2]:
            ctx.operations.rotate(part, *angles, -1, out=part)
        return *gradients, None, None, None, None, None
