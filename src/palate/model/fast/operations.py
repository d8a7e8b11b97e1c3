"""What layers of Llama-like models compute around their products: norm, rotation, gate, attention.

As separate tensor operations, each of these reads and writes its tensors many times, and autograd saves most
intermediate results. Here each is one function with an explicit derivative. The products that read a norm or
a gate belong to its function: backward computes the norm or the gate again, so that only what they are
computed from is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from palate.model.fast.attention import Attention, Layout


class Operations:
    """The operations and their derivatives in plain torch."""

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles of all layers as `rotate` reads them. (B, T, 1, D)"""
        return cos, sin

    def norm(
        self, hidden: Tensor, change: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden + change, its RMS norm over the last dimension, and the factor of each vector.

        hidden, change (..., H), change may be missing; factors (..., 1) or (...).
        """
        total = hidden if change is None else hidden + change
        return total, *rms_norm(total, weight, eps)

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
        """Return the gradients of the sum and, if `of_weight`, of the weight.

        With the factor r and g = w * d_out: dx = r g - x r^3 mean(g x), dw = sum of d_out * x r.
        """
        d_weight = None
        if of_weight:
            d_weight = (d_out * (total * factors)).flatten(0, -2).sum(0).to(weight.dtype)
        slope = (d_out * weight).to(factors.dtype)
        along = (slope * total).sum(-1, keepdim=True).mul_(factors**3).div_(total.shape[-1])
        d_x = slope.mul_(factors).addcmul_(total, along, value=-1)
        if d_total is not None:
            d_x += d_total
        return d_x.to(total.dtype), d_weight

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        """Rotate each pair (x_i, x_{i + D/2}) by its angle times `sign`.

        x (B, T, heads, D); cos and sin (B, T, 1, D) with two equal halves.
        """
        first, second = x.chunk(2, dim=-1)
        out = x * cos
        half = sin[..., : first.shape[-1]]
        left, right = out.chunk(2, dim=-1)
        left.addcmul_(second, half, value=-sign)
        right.addcmul_(first, half, value=sign)
        return out

    def gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up, for equal shapes."""
        return silu(gate).mul_(up)

    def gate_back(self, gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the gate's arguments."""
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate)
        return d_gate, silu(gate).mul_(d_out)

    def attend(
        self, layout: Layout, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention
    ) -> Tensor:
        """Return the attention of a layer. All (B, T, heads, D), with fewer heads of keys and values."""
        return layout.attend(layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), how)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the RMS norm, computed in float32, and the factor 1 / sqrt(mean(x^2) + eps) of each vector.

    It is rounded before the product with the weight, as in the models. x (..., H), factors (..., 1)
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    factors = factors.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * factors).to(x.dtype).mul_(weight), factors


def normalised(x: Tensor, norm: Any) -> Tensor:
    """Return the RMS norm over the last dimension, without gradient. x (..., H)"""
    return rms_norm(x, norm.weight, norm.variance_epsilon)[0]


class Map(NamedTuple):
    """A product x W^T + bias. weight (N, K), bias (N,) or None."""

    weight: Tensor
    bias: Tensor | None


def normed_products(
    operations: Operations, hidden: Tensor, change: Tensor | None, norm: Any, maps: Sequence[Map]
) -> tuple[Tensor, ...]:
    """Return hidden + change, and each map of its norm; without maps, the norm itself. hidden (..., H)"""
    given = [part for one in maps for part in one]
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _NormedProducts.apply(  # type: ignore[no-untyped-call]
            operations, norm.variance_epsilon, hidden, change, norm.weight, *given
        )
        return outputs
    total, normed, _ = operations.norm(hidden, change, norm.weight, norm.variance_epsilon)
    return total, *(_mapped(normed, maps) if maps else [normed])


def gated_product(operations: Operations, gate: Tensor, up: Tensor, one: Map | None) -> Tensor:
    """Return the map of silu(gate) * up; without a map, the gate itself. gate and up (M, K)"""
    if torch.is_grad_enabled():
        output: Tensor = _GatedProduct.apply(operations, gate, up, *(one or ()))  # type: ignore[no-untyped-call]
        return output
    between = operations.gate(gate, up)
    return between if one is None else linear(between, *one)


def rotated(operations: Operations, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding; see `Operations.rotate`."""
    if torch.is_grad_enabled():
        output: Tensor = _Rotated.apply(operations, x, cos, sin)  # type: ignore[no-untyped-call]
        return output
    return operations.rotate(x, cos, sin, 1)


def _mapped(x: Tensor, maps: Sequence[Map]) -> list[Tensor]:
    return [linear(x, *one) for one in maps]


def _maps(given: Sequence[Tensor | None]) -> list[Map]:
    pairs = zip(given[::2], given[1::2], strict=True)
    return [Map(weight, bias) for weight, bias in pairs if weight is not None]


def _of_map(x: Callable[[], Tensor], d_out: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """Return the gradients of a map's weight and bias, if they are wanted."""
    return [d_out.t() @ x() if wanted[0] else None, d_out.sum(0) if wanted[1] else None]


class _NormedProducts(torch.autograd.Function):
    """See `normed_products`; saves the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        eps: float,
        hidden: Tensor,
        change: Tensor | None,
        weight: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, ...]:
        total, normed, _ = operations.norm(hidden, change, weight, eps)
        ctx.save_for_backward(total, weight, *given)
        ctx.operations, ctx.eps, ctx.adds = operations, eps, change is not None
        ctx.set_materialize_grads(False)
        maps = _maps(given)
        return total if ctx.adds else total.detach(), *(_mapped(normed, maps) if maps else [normed])

    @staticmethod
    def backward(ctx: Any, d_total: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, *given = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:]
        _, normed, factors = ctx.operations.norm(total, None, weight, ctx.eps)
        d_normed = None if given else slopes[0]
        gradients: list[Tensor | None] = []
        for i, one in enumerate(_maps(given)):
            slope = slopes[i]
            if slope is None:
                gradients += [None, None]
                continue
            gradients += _of_map(lambda: normed, slope, wanted[1 + 2 * i :])
            d_normed = slope @ one.weight if d_normed is None else d_normed.addmm_(slope, one.weight)
        if d_normed is None:
            return None, None, d_total, d_total if ctx.adds else None, None, *gradients
        d_x, d_weight = ctx.operations.norm_back(
            total, weight, factors, d_normed, d_total, of_weight=wanted[0]
        )
        return None, None, d_x, d_x if ctx.adds else None, d_weight, *gradients


class _GatedProduct(torch.autograd.Function):
    """See `gated_product`; saves the arguments of the gate."""

    @staticmethod
    def forward(ctx: Any, operations: Operations, gate: Tensor, up: Tensor, *given: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, *given)
        ctx.operations = operations
        between = operations.gate(gate, up)
        return linear(between, *_maps(given)[0]) if given else between

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, *given = ctx.saved_tensors
        gradients: list[Tensor | None] = []
        for one in _maps(given):
            gradients = _of_map(lambda: ctx.operations.gate(gate, up), d_out, ctx.needs_input_grad[3:])
            d_out = d_out @ one.weight
        return None, *ctx.operations.gate_back(gate, up, d_out), *gradients


class _Rotated(torch.autograd.Function):
    """See `rotated`; backward rotates by the negative angle."""

    @staticmethod
    def forward(ctx: Any, operations: Operations, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.operations = operations
        return operations.rotate(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.operations.rotate(d_out, *ctx.saved_tensors, -1), None, None
