"""Log-probabilities of target tokens with compiled functions (see `native`); as `head`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palate.model.fast.head import MOST_SLOPES, WeightGradient, equal_parts
from palate.model.fast.native import Library
from palate.model.fast.native_layers import NativeOperations
from palate.model.heads import HeadValues


def native_values(
    hidden: Tensor, weight: Tensor, targets: Tensor, library: Library, *, statistics: bool
) -> HeadValues:
    """Return a head's numbers for each target token, without a bias, a soft cap and likeliest tokens.

    Args:
        hidden: hidden states (M, H), in the format of the functions.
        weight: (V, H).
        targets: int64 (M,).
        library: the functions.
        statistics: compute entropy and top1; otherwise they are zero.
    """
    logps, entropy, top1, logits = _Values.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, statistics, library, torch.is_grad_enabled()
    )
    none = logps.new_zeros(len(hidden), 0)
    return HeadValues(logps, entropy, top1, logits, none, targets.new_zeros(len(hidden), 0))


TILE = 1 << 25
"""Most logits in a tile: 64 MiB in bfloat16. Products of more rows use matrix units better."""
PART = 1 << 24
"""Most slopes in one product with the weight: for more rows torch uses one thread."""


class _Values(torch.autograd.Function):
    """log softmax(W h)[y] and the logits of targets, tile by tile; see `head._TargetValues`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        statistics: bool,
        library: Library,
        graded: bool,
    ) -> tuple[Tensor, ...]:
        ctx.library, ctx.trains_head = library, ctx.needs_input_grad[1]
        hidden = library.checked(hidden)
        logps, logits, normalisers = (hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(3))
        entropy, top1 = torch.zeros_like(logps), torch.zeros_like(logps)
        u = torch.empty_like(hidden) if ctx.needs_input_grad[0] and not ctx.trains_head else None
        # If all logits fit into the memory, backward computes none again.
        fits = len(hidden) * len(weight) <= MOST_SLOPES
        whole = graded and ctx.trains_head and _collects(weight) and fits
        memory = library.workspace(_rows(hidden, weight, MOST_SLOPES if whole else TILE), len(weight))
        ctx.use = library.use if whole else None
        for rows in _parts(hidden, weight, TILE):
            raw = memory[rows] if whole else memory[: rows.stop - rows.start]
            torch.mm(hidden[rows], weight.t(), out=raw)
            library.score_targets(
                raw,
                targets[rows],
                logps[rows],
                logits[rows],
                normalisers[rows],
                entropy[rows] if statistics else None,
                top1[rows] if statistics else None,
                *raw.shape,
            )
            if u is not None:
                ones = torch.ones_like(logps[rows])
                library.slope(raw, targets[rows], normalisers[rows], ones, None, *raw.shape)
                _times(raw, weight, u[rows])
        ctx.save_for_backward(hidden if u is None else u, weight, targets, normalisers)
        ctx.mark_non_differentiable(entropy, top1)
        ctx.set_materialize_grads(False)
        return logps, entropy, top1, logits

    @staticmethod
    def backward(
        ctx: Any, by_logp: Tensor | None, _entropy: None, _top1: None, by_logit: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        kept, weight, targets, normalisers = ctx.saved_tensors
        by_logp = torch.zeros_like(normalisers) if by_logp is None else by_logp.contiguous()
        if not ctx.trains_head:
            d_hidden = by_logp[:, None] * kept
            if by_logit is not None:
                d_hidden = d_hidden.addcmul(by_logit[:, None], weight[targets].to(d_hidden.dtype))
            return d_hidden.to(kept.dtype), None, None, None, None, None
        by_logit = None if by_logit is None else by_logit.contiguous()
        has_logits = ctx.use is not None and ctx.use is ctx.library.use
        most = MOST_SLOPES if _collects(weight) else TILE
        memory = ctx.library.workspace(_rows(kept, weight, most), len(weight))
        product = NativeOperations(ctx.library).weight_gradient
        d_hidden, d_weight = torch.empty_like(kept), WeightGradient(kept, weight, memory, product)
        for rows in _parts(kept, weight, TILE):
            raw = d_weight.memory(rows)
            if not has_logits:
                torch.mm(kept[rows], weight.t(), out=raw)
            of_logits = None if by_logit is None else by_logit[rows]
            ctx.library.slope(raw, targets[rows], normalisers[rows], by_logp[rows], of_logits, *raw.shape)
            _times(d_weight.add(raw, rows), weight, d_hidden[rows])
        return d_hidden, d_weight.total(), None, None, None, None


def _collects(weight: Tensor) -> bool:
    """Return whether the gradient of the weight collects slopes of several tiles: not in float32."""
    return weight.dtype.itemsize < 4


def _rows(hidden: Tensor, weight: Tensor, most: int) -> int:
    """Return the rows whose logits are in memory at a time, for at most `most` logits."""
    return min(len(hidden), max(most // len(weight), 1))


def _parts(hidden: Tensor, weight: Tensor, most: int) -> list[slice]:
    return equal_parts(len(hidden), most // len(weight))


def _times(slopes: Tensor, weight: Tensor, out: Tensor) -> None:
    """Write slopes W. slopes (M, V), out (M, H)"""
    for rows in _parts(slopes, weight, PART):
        torch.mm(slopes[rows], weight, out=out[rows])
