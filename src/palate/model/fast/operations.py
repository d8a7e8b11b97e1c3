"""What layers of Llama-like models compute around their products: norm, rotation, gate, attention.

As separate tensor operations, each of these reads and writes its tensors many times, and autograd saves most
intermediate results. Here each is one function with an explicit derivative. The products that read a norm or
a gate belong to its function: backward computes the norm or the gate again, so that only what they are
computed from is kept. A whole MLP is one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
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

    def gate(self, gate: Tensor, up: Tensor, *, keep: bool = True) -> Tensor:
        """Return silu(gate) * up, for equal shapes; overwrites `gate` unless `keep`."""
        return silu(gate).mul_(up)

    def gate_back(
        self, gate: Tensor, up: Tensor, d_out: Tensor, *, keep: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return silu(gate) * up and the gradients of both; overwrites the arguments unless `keep`."""
        act = silu(gate)
        return act * up, torch.ops.aten.silu_backward(d_out * up, gate), act.mul_(d_out)

    def weight_gradient(self, d_out: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of a map's weight, d_out^T x. (M, N), (M, K) to (N, K)"""
        return d_out.t() @ x

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
        """Rotate queries and keys; return the attention of a layer.

        All (B, T, heads, D), with fewer heads of keys and values; see `angles`.
        """
        query, key = (rotated(self, part, *angles) for part in (query, key))
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
    """The product x W^T + bias, and an adapter's scaling * (x A^T) B^T.

    Attributes:
        weight, bias: (N, K), and (N,) or None.
        down, up: the adapter's A (R, K) and B (N, R), or None.
        scaling: the adapter's factor.
    """

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the map of x. (M, K) to (M, N)"""
        out = linear(x, self.weight, self.bias)
        if self.down is None or self.up is None:
            return out
        return out.addmm_(linear(x, self.down), self.up.t(), alpha=self.scaling)

    def back(self, d_out: Tensor, d_x: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of x, added to `d_x` in place, and of the adapter's x A^T."""
        d_x = d_out @ self.weight if d_x is None else d_x.addmm_(d_out, self.weight)
        if self.down is None or self.up is None:
            return d_x, None
        d_low = (d_out @ self.up).mul_(self.scaling)
        return d_x.addmm_(d_low, self.down), d_low

    def gradients(
        self, operations: Operations, x: Tensor, d_out: Tensor, d_low: Tensor | None, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of the four tensors, as far as wanted; `d_low` is from `back`."""
        gradients = [
            operations.weight_gradient(d_out, x) if wanted[0] else None,
            d_out.sum(0) if wanted[1] else None,
            None,
            None,
        ]
        if d_low is not None and self.down is not None:
            gradients[2] = d_low.t() @ x if wanted[2] else None
            gradients[3] = (d_out.t() @ linear(x, self.down)).mul_(self.scaling) if wanted[3] else None
        return gradients


TENSORS = 4
"""The number of tensors of a map."""


def normed_products(
    operations: Operations, hidden: Tensor, change: Tensor | None, norm: Any, maps: Sequence[Map]
) -> tuple[Tensor, ...]:
    """Return hidden + change, and each map of its norm; without maps, the norm itself. hidden (..., H)"""
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _NormedProducts.apply(  # type: ignore[no-untyped-call]
            operations, norm.variance_epsilon, _scalings(maps), hidden, change, norm.weight, *_tensors(maps)
        )
        return outputs
    total, normed, _ = operations.norm(hidden, change, norm.weight, norm.variance_epsilon)
    return total, *([one(normed) for one in maps] if maps else [normed])


def mlp(
    operations: Operations, hidden: Tensor, change: Tensor | None, norm: Any, maps: Sequence[Map]
) -> tuple[Tensor, Tensor]:
    """Return hidden + change, and down(silu(gate(n)) * up(n)) of its norm n, for the maps gate, up and down.

    hidden, change (M, H)
    """
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, Tensor] = _MLP.apply(  # type: ignore[no-untyped-call]
            operations, norm.variance_epsilon, _scalings(maps), hidden, change, norm.weight, *_tensors(maps)
        )
        return outputs
    gate, up, down = maps
    total, normed, _ = operations.norm(hidden, change, norm.weight, norm.variance_epsilon)
    return total, down(operations.gate(gate(normed), up(normed), keep=False))


def product(operations: Operations, x: Tensor, one: Map) -> Tensor:
    """Return the map of x. (M, K) to (M, N)"""
    if torch.is_grad_enabled():
        output: Tensor = _Product.apply(operations, one.scaling, x, *_tensors([one]))  # type: ignore[no-untyped-call]
        return output
    return one(x)


def gated(operations: Operations, gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, for equal shapes."""
    if torch.is_grad_enabled():
        output: Tensor = _Gated.apply(operations, gate, up)  # type: ignore[no-untyped-call]
        return output
    return operations.gate(gate, up)


def rotated(operations: Operations, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding; see `Operations.rotate`."""
    if torch.is_grad_enabled():
        output: Tensor = _Rotated.apply(operations, x, cos, sin)  # type: ignore[no-untyped-call]
        return output
    return operations.rotate(x, cos, sin, 1)


# Autograd functions take tensors as separate arguments, and the rest of the maps as one.


def _scalings(maps: Sequence[Map]) -> list[float]:
    return [one.scaling for one in maps]


def _tensors(maps: Sequence[Map]) -> list[Tensor | None]:
    return [tensor for one in maps for tensor in (one.weight, one.bias, one.down, one.up)]


def _maps(scalings: Sequence[float], tensors: Sequence[Any]) -> list[Map]:
    maps: list[Map] = []
    for i, scaling in enumerate(scalings):
        weight, bias, down, up = tensors[TENSORS * i : TENSORS * (i + 1)]
        maps.append(Map(weight, bias, down, up, scaling))
    return maps


class _NormedProducts(torch.autograd.Function):
    """See `normed_products`; saves the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        eps: float,
        scalings: Sequence[float],
        hidden: Tensor,
        change: Tensor | None,
        weight: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        total, normed, _ = operations.norm(hidden, change, weight, eps)
        ctx.save_for_backward(total, weight, *tensors)
        ctx.operations, ctx.eps, ctx.scalings, ctx.adds = operations, eps, scalings, change is not None
        ctx.set_materialize_grads(False)
        outputs = [one(normed) for one in _maps(scalings, tensors)] or [normed]
        return total if ctx.adds else total.detach(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, *tensors = ctx.saved_tensors
        maps = _maps(ctx.scalings, tensors)
        return None, None, None, *_through_norm(ctx, total, weight, maps, slopes, d_total)


def _through_norm(
    ctx: Any,
    total: Tensor,
    weight: Tensor,
    maps: Sequence[Map],
    slopes: Sequence[Tensor | None],
    d_total: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of hidden, change, the norm's weight and the tensors, from slopes of the maps.

    Without maps, the slope is that of the norm. The arguments of the function are those of `_NormedProducts`.
    """
    _, normed, factors = ctx.operations.norm(total, None, weight, ctx.eps)
    d_normed = None if maps else slopes[0]
    gradients: list[Tensor | None] = []
    for i, (one, slope) in enumerate(zip(maps, slopes, strict=False)):
        if slope is None:
            gradients += [None] * TENSORS
            continue
        d_normed, d_low = one.back(slope, d_normed)
        wanted = ctx.needs_input_grad[6 + TENSORS * i :]
        gradients += one.gradients(ctx.operations, normed, slope, d_low, wanted)
    d_x, d_weight = d_total, None
    if d_normed is not None:
        d_x, d_weight = ctx.operations.norm_back(
            total, weight, factors, d_normed, d_total, of_weight=ctx.needs_input_grad[5]
        )
    return [d_x, d_x if ctx.adds else None, d_weight, *gradients]


class _MLP(torch.autograd.Function):
    """See `mlp`; saves the sum, and the arguments of the gate, which backward overwrites."""

    @staticmethod
    def forward(
        ctx: Any,
        operations: Operations,
        eps: float,
        scalings: Sequence[float],
        hidden: Tensor,
        change: Tensor | None,
        weight: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        total, normed, _ = operations.norm(hidden, change, weight, eps)
        ctx.operations, ctx.eps, ctx.scalings, ctx.adds = operations, eps, scalings, change is not None
        gate_map, up_map, down_map = _maps(scalings, tensors)
        gate, up = gate_map(normed), up_map(normed)
        ctx.save_for_backward(total, weight, gate, up, *tensors)
        return total if ctx.adds else total.detach(), down_map(operations.gate(gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_out: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, gate, up, *tensors = ctx.saved_tensors
        *maps, down = _maps(ctx.scalings, tensors)
        d_between, d_low = down.back(d_out)
        between, *slopes = ctx.operations.gate_back(gate, up, d_between, keep=False)
        wanted = ctx.needs_input_grad[-TENSORS:]
        of_down = down.gradients(ctx.operations, between, d_out, d_low, wanted)
        del gate, up, d_between, between
        return None, None, None, *_through_norm(ctx, total, weight, maps, slopes, d_total), *of_down


class _Product(torch.autograd.Function):
    """See `product`."""

    @staticmethod
    def forward(
        ctx: Any, operations: Operations, scaling: float, x: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, *tensors)
        ctx.operations, ctx.scaling = operations, scaling
        (one,) = _maps([scaling], tensors)
        return one(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        (one,) = _maps([ctx.scaling], tensors)
        d_x, d_low = one.back(d_out)
        return None, None, d_x, *one.gradients(ctx.operations, x, d_out, d_low, ctx.needs_input_grad[3:])


class _Gated(torch.autograd.Function):
    """See `gated`."""

    @staticmethod
    def forward(ctx: Any, operations: Operations, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.operations = operations
        return operations.gate(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.operations.gate_back(*ctx.saved_tensors, d_out)[1:]


class _Rotated(torch.autograd.Function):
    """See `rotated`; backward rotates by the negative angle."""

    @staticmethod
    def forward(ctx: Any, operations: Operations, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.operations = operations
        return operations.rotate(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.operations.rotate(d_out, *ctx.saved_tensors, -1), None, None
