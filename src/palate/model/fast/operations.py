"""What layers of Llama-like models compute around their products: norm, rotation, gate, attention.

As separate tensor operations, each of these reads and writes its tensors many times, and autograd saves most
intermediate results. Here each is one function with an explicit derivative. The products that read a norm or
a gate belong to its function: backward computes the norm or the gate again, so that only what they are
computed from is kept. A whole MLP is one function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.maps import TENSORS, Map, maps_of, scalings_of, tensors_of


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

    def weight_gradient(self, slope: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of a map's weight, slope^T x. (M, N), (M, K) to (N, K)"""
        return self.weight_gradients([slope], x)[0]

    def weight_gradients(self, slopes: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Return the gradients of the weights of maps of the same arguments."""
        return [slope.t() @ x for slope in slopes]

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


def gradients_of(
    operations: Operations,
    maps: Sequence[Map],
    x: Tensor,
    slopes: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of all tensors of maps of x, as far as wanted.

    Args:
        operations: computes the gradients of weights.
        maps: the maps.
        x: their argument (M, K).
        slopes: the gradient of each map's output (M, N), or None if it has none.
        lows: the second result of `Map.back` for each.
        wanted: whether a gradient is wanted, for each tensor of each map.
    """
    heavy = [i for i, slope in enumerate(slopes) if slope is not None and wanted[TENSORS * i]]
    computed = operations.weight_gradients([slope for i in heavy if (slope := slopes[i]) is not None], x)
    weights = dict(zip(heavy, computed, strict=True))
    gradients: list[Tensor | None] = []
    for i, (one, slope, low) in enumerate(zip(maps, slopes, lows, strict=True)):
        if slope is None:
            gradients += [None] * TENSORS
            continue
        own = wanted[TENSORS * i : TENSORS * (i + 1)]
        gradients += [weights.get(i), *one.small_gradients(x, slope, low, own)]
    return gradients


def normed_products(
    operations: Operations, hidden: Tensor, change: Tensor | None, norm: Any, maps: Sequence[Map]
) -> tuple[Tensor, ...]:
    """Return hidden + change, and each map of its norm; without maps, the norm itself. hidden (..., H)"""
    if torch.is_grad_enabled():
        outputs: tuple[Tensor, ...] = _NormedProducts.apply(  # type: ignore[no-untyped-call]
            operations,
            norm.variance_epsilon,
            scalings_of(maps),
            hidden,
            change,
            norm.weight,
            *tensors_of(maps),
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
            operations,
            norm.variance_epsilon,
            scalings_of(maps),
            hidden,
            change,
            norm.weight,
            *tensors_of(maps),
        )
        return outputs
    gate, up, down = maps
    total, normed, _ = operations.norm(hidden, change, norm.weight, norm.variance_epsilon)
    return total, down(operations.gate(gate(normed), up(normed), keep=False))


def product(operations: Operations, x: Tensor, one: Map) -> Tensor:
    """Return the map of x. (M, K) to (M, N)"""
    if torch.is_grad_enabled():
        output: Tensor = _Product.apply(operations, one.scaling, x, *tensors_of([one]))  # type: ignore[no-untyped-call]
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
        outputs = [one(normed) for one in maps_of(scalings, tensors)] or [normed]
        return total if ctx.adds else total.detach(), *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor | None, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, *tensors = ctx.saved_tensors
        maps = maps_of(ctx.scalings, tensors)
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
    slopes = slopes[: len(maps)]
    lows: list[Tensor | None] = [None] * len(maps)
    for i, (one, slope) in enumerate(zip(maps, slopes, strict=True)):
        if slope is not None:
            d_normed, lows[i] = one.back(slope, d_normed)
    wanted = ctx.needs_input_grad[6:]
    gradients = gradients_of(ctx.operations, maps, normed, slopes, lows, wanted) if maps else []
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
        gate_map, up_map, down_map = maps_of(scalings, tensors)
        gate, up = gate_map(normed), up_map(normed)
        ctx.save_for_backward(total, weight, gate, up, *tensors)
        return total if ctx.adds else total.detach(), down_map(operations.gate(gate, up))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, d_out: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, gate, up, *tensors = ctx.saved_tensors
        *maps, down = maps_of(ctx.scalings, tensors)
        d_between, d_low = down.back(d_out)
        between, *slopes = ctx.operations.gate_back(gate, up, d_between, keep=False)
        wanted = ctx.needs_input_grad[-TENSORS:]
        of_down = gradients_of(ctx.operations, [down], between, [d_out], [d_low], wanted)
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
        (one,) = maps_of([scaling], tensors)
        return one(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        (one,) = maps_of([ctx.scaling], tensors)
        d_x, d_low = one.back(d_out)
        gradients = gradients_of(ctx.operations, [one], x, [d_out], [d_low], ctx.needs_input_grad[3:])
        return None, None, d_x, *gradients


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
