"""Passes over all gradients and weights of an update, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class Passes:
    """The passes of an update; `model.fast.native_passes` computes them faster."""

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients together, a number."""
        return nn.utils.get_total_norm(gradients)

    def add(self, gradient: Tensor, total: Tensor) -> None:
        """Add a gradient to a sum of gradients, of the same shape, which may have a wider format."""
        total.add_(gradient)

    def narrow(self, weight: Tensor, out: Tensor) -> None:
        """Round a weight to the format of `out`, which has the same shape."""
        out.copy_(weight)
