"""Linear maps of layers, with their adapters, and their derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.functional import linear


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

    def small_gradients(
        self, x: Tensor, d_out: Tensor, d_low: Tensor | None, wanted: Sequence[bool]
    ) -> list[Tensor | None]:
        """Return the gradients of the tensors after the weight, as far as wanted; `d_low` is from `back`."""
        gradients = [d_out.sum(0) if wanted[1] else None, None, None]
        if d_low is not None and self.down is not None:
            gradients[1] = d_low.t() @ x if wanted[2] else None
            gradients[2] = (d_out.t() @ linear(x, self.down)).mul_(self.scaling) if wanted[3] else None
        return gradients


TENSORS = 4
"""The number of tensors of a map."""


# Autograd functions take tensors as separate arguments, and the rest of the maps as one.


def scalings_of(maps: Sequence[Map]) -> list[float]:
    """Return the factors of the maps' adapters."""
    return [one.scaling for one in maps]


def tensors_of(maps: Sequence[Map]) -> list[Tensor | None]:
    """Return the tensors of all maps, `TENSORS` of each."""
    return [tensor for one in maps for tensor in (one.weight, one.bias, one.down, one.up)]


def maps_of(scalings: Sequence[float], tensors: Sequence[Any]) -> list[Map]:
    """Return the maps with these factors and tensors."""
    maps: list[Map] = []
    for i, scaling in enumerate(scalings):
        weight, bias, down, up = tensors[TENSORS * i : TENSORS * (i + 1)]
        maps.append(Map(weight, bias, down, up, scaling))
    return maps
