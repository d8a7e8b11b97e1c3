"""Products of a few rows in sampling with compiled functions (see `native`)."""

from __future__ import annotations

from torch import Tensor

from palate.model.fast.fused import Packing, Product, by_torch
from palate.model.fast.native import PANEL, Library


class FewRows:
    """x W^T + bias with matrix units, whose weight is stored in the order in which they read it.

    A library's product of 32 rows takes half as long again; this one waits for memory alone.

    Args:
        library: the functions.
        weight: (N, K), multiples of `PANEL`.
        bias: (N,) or None.
    """

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None) -> None:
        self._library, self._bias = library, None if bias is None else library.checked(bias)
        self._outputs, self._inputs = weight.shape
        self._panels = weight.new_empty(weight.numel())
        library.pack_weight(library.checked(weight), self._panels, *weight.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product. x (M, K), result (M, N)"""
        assert x.shape[1] == self._inputs, "a product of another size"
        x = self._library.checked(x)
        out = x.new_empty(len(x), self._outputs)
        self._library.few_rows(x, self._panels, self._bias, out, len(x), self._outputs, self._inputs)
        return out


def packing_of(library: Library | None) -> Packing:
    """Return how weights are packed for sampling with a library's functions, or without any."""

    def pack(weight: Tensor, bias: Tensor | None) -> Product:
        if library is None or not library.has_tiles() or any(size % PANEL for size in weight.shape):
            return by_torch(weight, bias)
        return FewRows(library, weight, bias)

    return pack
