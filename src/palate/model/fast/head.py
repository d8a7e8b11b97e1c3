"""Log-probabilities of target tokens from hidden states, with at most one tile of logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from palate.model.heads import HeadValues

FEW_ROWS = 128
"""Largest number of rows for which `W x^T` is the faster product in float32 on a CPU."""
TILE_BYTES = 30 << 20
"""Size of a tile, tokens x vocabulary. The C library requests blocks of 32 MiB and more from the system each
time, and the first access to each new page costs as much as the arithmetic on it."""
MOST_SLOPES = 1 << 26
"""Number of half-precision gradients of logits that a trained head collects: 128 MiB. A product with
them is as large as the head's weight, so several tiles share one."""
ACCELERATOR_TILES = 8
"""Factor on the size of tiles on an accelerator, which has its own allocator."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x W^T + bias by the faster of two ways. x (M, K), weight (N, K), result (M, N) with any strides.

    Only for sampling: the two ways differ in the last bits, and a policy must not differ from its reference.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu" or len(x) > FEW_ROWS:
        return nn.functional.linear(x, weight, bias)
    transposed = weight @ x.t() if bias is None else torch.addmm(bias[:, None], weight, x.t())
    return transposed.t()


@dataclass(frozen=True)
class LMHead:
    """A model's map from hidden states to logits.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: limit of the logits, softcap * tanh(raw / softcap), as in Gemma; or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, network: Any) -> LMHead | None:
        """Return the head of a causal model, or None if this module does not support it."""
        layer = network.get_output_embeddings()
        if type(layer) is not nn.Linear:
            return None
        return cls(
            layer.weight,
            layer.bias,
            network.config.get_text_config().to_dict().get("final_logit_softcapping"),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits (M, V) in the compute dtype, or in float32 after a soft cap. hidden (M, H)"""
        return self.capped(product(hidden, self.weight, self.bias).contiguous())

    def capped(self, logits: Tensor) -> Tensor:
        """Return raw logits after the soft cap, which is computed in float32. (M, V)"""
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits.to(_wide(logits)) / self.softcap)

    def logps(
        self, hidden: Tensor, targets: Tensor, *, statistics: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probability, entropy and top1 of each target token; see `values`."""
        values = self.values(hidden, targets, statistics=statistics)
        return values.logps, values.entropy, values.top1

    def values(
        self, hidden: Tensor, targets: Tensor, *, statistics: bool = False, top_logits: int = 0
    ) -> HeadValues:
        """Compute the head's numbers for each target token.

        Args:
            hidden: hidden states (M, H), which may carry gradient.
            targets: target tokens, int64 (M,).
            statistics: compute entropy and top1; otherwise they are zero.
            top_logits: K, the number of likeliest tokens to return with their logits; at most V.
        """
        return HeadValues(
            *_TargetValues.apply(  # type: ignore[no-untyped-call]
                hidden, self.weight, self.bias, targets, self.softcap, statistics, top_logits
            )
        )


class _TargetValues(torch.autograd.Function):
    """log softmax(W h + b)[y] and single logits, computed tile by tile.

    The log-probability of a token depends only on its own hidden state, so forward computes its derivative
    u = W^T (onehot(y) - softmax) while the tile of logits is in memory; backward only scales u by the
    incoming gradient. The derivative of a logit is a row of W. If the head itself is trained, its gradient
    needs the incoming gradient within the tile, so backward recomputes the tiles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        statistics: bool,
        top_logits: int,
    ) -> tuple[Tensor, ...]:
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wants_u = ctx.needs_input_grad[0] and not trains_head
        logps, entropy, top1, logits = (hidden.new_zeros(len(hidden), dtype=_wide(hidden)) for _ in range(4))
        kept = len(hidden), min(top_logits, len(weight))
        top, tokens = logps.new_zeros(kept), targets.new_zeros(kept)
        u = torch.empty_like(hidden) if wants_u else None
        tile = _Tile(weight, bias, softcap)
        for rows in tiles(hidden, weight):
            scored = tile.scored(hidden[rows])
            probs = tile.probs(scored, keep=True)
            # Compute log sum exp from the likeliest token, whose probability cannot underflow: this only
            # reads the tile twice, and avoids a second exp.
            normaliser = scored.amax(-1) - probs.amax(-1).log()
            target = targets[rows, None]
            logits[rows] = scored.gather(-1, target)[:, 0]
            logps[rows] = logits[rows] - normaliser
            if kept[1]:
                top[rows], tokens[rows] = scored.topk(kept[1], dim=-1)
            if statistics:
                top1[rows] = (scored.argmax(-1) == targets[rows]).to(top1.dtype)
                # As a product: it reads both and writes no third tile.
                entropy[rows] = normaliser - torch.bmm(probs[:, None], scored[:, :, None])[:, 0, 0]
            if u is not None:
                u[rows] = tile.half(_uncapped(_slope(probs, target), scored, softcap)) @ weight
        ctx.softcap, ctx.trains_head = softcap, trains_head
        ctx.save_for_backward(hidden if u is None else u, weight, bias, targets, logits, top, tokens)
        ctx.mark_non_differentiable(entropy, top1, tokens)
        ctx.set_materialize_grads(False)
        return logps, entropy, top1, logits, top, tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        by_logp, _, _, by_logit, by_top, _ = gradients
        targets, logits, top, tokens = ctx.saved_tensors[3:]
        by_logp = torch.zeros_like(logits) if by_logp is None else by_logp
        single = None
        if not (by_logit is None and by_top is None):
            by_logit = torch.zeros_like(logits) if by_logit is None else by_logit
            by_top = torch.zeros_like(top) if by_top is None else by_top
            single = _Logits(
                torch.cat((targets[:, None], tokens), 1),
                torch.cat((logits[:, None], top), 1),
                torch.cat((by_logit[:, None], by_top), 1),
            )
        through = _through_tiles if ctx.trains_head else _through_slopes
        return *through(ctx, by_logp[:, None], single), None, None, None, None


class _Logits(NamedTuple):
    """Single logits of each token and their gradients: the target's and the K largest. (M, 1 + K)"""

    tokens: Tensor
    values: Tensor
    gradients: Tensor


_Gradients = tuple[Tensor, Tensor | None, Tensor | None]
"""The gradients of hidden states, weight and bias."""


def _through_slopes(ctx: Any, by_logp: Tensor, single: _Logits | None) -> _Gradients:
    """Compute gradients from the derivatives that forward has saved, for a head that is not trained."""
    u, weight, *_ = ctx.saved_tensors
    d_hidden = by_logp * u
    if single is not None:
        gradients = _uncapped(single.gradients.clone(), single.values, ctx.softcap)
        for column in range(gradients.shape[1]):  # one column at a time: (M, H) instead of (M, K, H)
            d_hidden = d_hidden.addcmul(
                gradients[:, column, None], weight[single.tokens[:, column]].to(d_hidden.dtype)
            )
    return d_hidden.to(u.dtype), None, None


def _through_tiles(ctx: Any, by_logp: Tensor, single: _Logits | None) -> _Gradients:
    """Compute gradients with recomputed tiles, for a trained head."""
    hidden, weight, bias, targets, *_ = ctx.saved_tensors
    d_hidden = torch.empty_like(hidden)
    d_weight = WeightGradient(hidden, weight)
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(bias))
    tile = _Tile(weight, bias, ctx.softcap)
    for rows in tiles(hidden, weight):
        scored = tile.scored(hidden[rows])
        probs = tile.probs(scored, keep=ctx.softcap is not None)
        # by_logp * (onehot(y) - softmax), with one pass over the tile
        d_scored = probs.mul_(-by_logp[rows]).scatter_add_(-1, targets[rows, None], by_logp[rows])
        if single is not None:
            d_scored.scatter_add_(-1, single.tokens[rows], single.gradients[rows])
        d_raw = _uncapped(d_scored, scored, ctx.softcap)
        d_hidden[rows] = d_weight.add(d_raw, rows) @ weight
        if d_bias is not None:
            d_bias += d_raw.sum(0)
    return d_hidden, d_weight.total(), None if d_bias is None else d_bias.to(bias.dtype)


class WeightGradient:
    """The gradient of the head's weight, summed over tiles: slopes^T hidden.

    In half precision, slopes are collected, so that few products of the weight's size are made and summed.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        memory: Tensor | None = None,
        product: Callable[[Tensor, Tensor], Tensor] = lambda slopes, hidden: slopes.T @ hidden,
    ) -> None:
        """Begin a sum.

        Args:
            hidden, weight: as in the head.
            memory: (M, V), for slopes, at least as large as a tile; by default new memory.
            product: computes slopes^T hidden.
        """
        self._hidden, self._weight, self._product = hidden, weight, product
        self._total: Tensor | None = None
        self._half = _wide(weight) != weight.dtype
        self._most = max(MOST_SLOPES // len(weight), 1)
        self._slopes = memory
        self._first = self._next = 0  # the rows whose slopes are collected

    def add(self, slopes: Tensor, rows: slice) -> Tensor:
        """Add a tile's slopes; return them in the format of the weight. (M, V)"""
        if not self._half:
            if self._total is None:
                self._total = torch.zeros_like(self._weight)
            self._total.addmm_(slopes.T, self._hidden[rows])  # avoids a second (V, H) tensor per tile
            return slopes
        memory = self.memory(rows)
        self._next = rows.stop
        return slopes if slopes.data_ptr() == memory.data_ptr() else memory.copy_(slopes)

    def memory(self, rows: slice) -> Tensor:
        """Return memory in which a tile's slopes may be computed, so that `add` does not copy them. (M, V)"""
        count, size = rows.stop - rows.start, len(self._weight)
        if self._slopes is None or rows.stop - self._first > len(self._slopes):
            self._flush()
            most = min(max(self._most, count), len(self._hidden) - rows.start) if self._half else count
            if self._slopes is None or len(self._slopes) < most:
                self._slopes = self._weight.new_empty(most, size)
        if not self._half:
            return self._slopes[:count]
        return self._slopes[rows.start - self._first : rows.stop - self._first]

    def _flush(self) -> None:
        if self._next > self._first:
            assert self._slopes is not None
            rows = slice(self._first, self._next)
            part = self._product(self._slopes[: self._next - self._first], self._hidden[rows])
            self._total = part if self._total is None else self._total.to(_wide(part)).add_(part)
        self._first = self._next

    def total(self) -> Tensor:
        """Return the sum, in the format of the weight. (V, H)"""
        self._flush()
        if self._total is None:  # no tokens
            return torch.zeros_like(self._weight)
        return self._total.to(self._weight.dtype)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Tile:
    """Computes the logits of one tile after another in the same memory.

    New memory for each tile would cost as much as the arithmetic: the system clears each page of it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, softcap: float | None) -> None:
        self._weight, self._bias, self._softcap = weight, bias, softcap
        self._kept: dict[str, Tensor] = {}

    def scored(self, hidden: Tensor) -> Tensor:
        """Return the logits after the soft cap, in float32. (M, H) to (M, V)"""
        raw = self._memory("raw", len(hidden), hidden.dtype)
        if self._bias is None:
            torch.mm(hidden, self._weight.t(), out=raw)
        else:
            torch.addmm(self._bias, hidden, self._weight.t(), out=raw)
        wide = raw if _wide(raw) == raw.dtype else self._memory("scored", len(raw), _wide(raw)).copy_(raw)
        return wide if self._softcap is None else wide.div_(self._softcap).tanh_().mul_(self._softcap)

    def probs(self, scored: Tensor, *, keep: bool) -> Tensor:
        """Return the softmax of the logits, which it overwrites unless `keep`. (M, V)"""
        out = self._memory("probs", len(scored), scored.dtype) if keep else scored
        return torch.softmax(scored, -1, out=out)

    def half(self, slopes: Tensor) -> Tensor:
        """Return gradients of raw logits in the format of the weight; overwrites the raw logits. (M, V)"""
        if slopes.dtype == self._weight.dtype:
            return slopes
        return self._memory("raw", len(slopes), self._weight.dtype).copy_(slopes)

    def _memory(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        if name not in self._kept or len(self._kept[name]) < rows:
            self._kept[name] = self._weight.new_empty(rows, len(self._weight), dtype=dtype)
        return self._kept[name][:rows]


def _slope(probs: Tensor, target: Tensor) -> Tensor:
    """Return the derivative of the log-probability by the logits; overwrites `probs`. (M, V)"""
    return probs.neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=probs.dtype))


def _uncapped(slope: Tensor, scored: Tensor, softcap: float | None) -> Tensor:
    """Return the gradient of raw logits from the gradient of the logits `scored`; overwrites `slope`."""
    return slope if softcap is None else slope.mul_(1 - (scored / softcap) ** 2)


def tiles(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Return the rows of each tile. hidden (M, H), weight (V, H)"""
    most = TILE_BYTES if hidden.device.type == "cpu" else ACCELERATOR_TILES * TILE_BYTES
    return equal_parts(len(hidden), most // (4 * len(weight)))


def equal_parts(rows: int, most: int) -> list[slice]:
    """Divide rows into as few parts of at most `most` as possible, about equally long."""
    count = -(-rows // max(most, 1))
    size = -(-rows // max(count, 1))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, max(size, 1))]
