"""Attention of a packed row with segments of similar length as one batch, for half precision on CPUs.

A row of short segments would need a call per segment and layer, and each call costs more than its arithmetic.
Here, segments of similar length are padded to a batch: two batched products and a softmax. A long segment is
divided into blocks of queries, each of which sees the blocks before it, so that little of what it may not see
is computed. Scores and their gradients are in float32, as in torch's kernel; the other products are in half
precision, in which processors are faster than that kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.model.fast.attention import Attention
from palate.model.fast.segments import Shape, seen_by

PADDED = 1.25
"""Most scores of a batch over those that its segments need."""
MOST_SCORES = 1 << 16
"""Most scores of a segment, queries times keys. For more, torch's kernel is faster, which stores none."""
BLOCK = 128
"""Most queries in a block of a segment."""
MOST_BATCH = 1 << 17
"""Most scores of a batch, which bounds its memory."""


class Batches:
    """Attention over the segments of a packed row, as `Segments`, with similar segments as batches.

    Args:
        records: for each record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.parts = similar(segments_of(records))
        self.tokens = sum(prompt + sum(completions) for prompt, completions in records)
        order = [place for part in self.parts for s in part for place in range(s.start, s.start + s.size)]
        self._back = torch.tensor(order).argsort()
        self._heads: dict[tuple[int, int | None, int, int], Heads] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """Compute attention. query (1, heads, L, D), key and value (1, kv heads, L, D); (1, L, heads, D)"""
        outputs: list[Tensor] = []
        for i, part in enumerate(self.parts):
            if part[0].size * part[0].keys > MOST_SCORES:
                outputs.append(_alone(part[0], query, key, value, how))
                continue
            heads = query.shape[1], key.shape[1]
            name = i, how.window, *heads
            if name not in self._heads:
                self._heads[name] = Heads(Batch(part, self.tokens, how.window), *heads)
            outputs.append(batched_attention(query, key, value, self._heads[name], how.scaling))
        return torch.cat(outputs).index_select(0, self._back)[None]


def _alone(segment: Segment, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
    """Compute the attention of one segment. The result is (T, heads, D)."""
    places = [*segment.seen, (segment.start, segment.size)]
    keys, values = (
        torch.cat([t[:, :, start : start + size] for start, size in places], 2) for t in (key, value)
    )
    own = slice(segment.start, segment.start + segment.size)
    mask = seen_by(segment.before, segment.size, how.window, query.device)
    return how(query[:, :, own], keys, values, mask)[0].transpose(0, 1)


class Segment(NamedTuple):
    """A prompt or a completion in a packed row, or a block of one.

    Attributes:
        start, size: its place in the row.
        seen: start and size of each stretch of the row that it sees before itself: a completion its prompt,
            and a block the blocks before it.
    """

    start: int
    size: int
    seen: tuple[tuple[int, int], ...] = ()

    @property
    def before(self) -> int:
        """The number of tokens that it sees before itself."""
        return sum(size for _, size in self.seen)

    @property
    def keys(self) -> int:
        """The number of keys that it sees at most."""
        return self.before + self.size


def segments_of(records: Shape) -> list[Segment]:
    """Return the segments of a packed row, in order."""
    segments: list[Segment] = []
    start = 0
    for prompt, completions in records:
        first = start
        segments += _blocks(start, prompt, ())
        start += prompt
        for size in completions:
            segments += _blocks(start, size, ((first, prompt),) if prompt else ())
            start += size
    return segments


def _blocks(start: int, size: int, seen: tuple[tuple[int, int], ...]) -> list[Segment]:
    """Return the blocks of a prompt or a completion; a single one if its scores are too many for a batch."""
    keys = size + sum(other for _, other in seen)
    block = BLOCK if BLOCK * keys <= MOST_SCORES else max(size, 1)
    return [
        Segment(start + i, min(block, size - i), (*seen, (start, i)) if i else seen)
        for i in range(0, size, block)
    ]


def similar(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Divide segments into batches of similar size; one with too many scores is alone."""
    batches: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda s: (s.size, s.keys, s.start)):
        if segment.size == 0:
            continue
        joined = [*batches[-1], segment] if batches else [segment]
        needed = sum(s.size * s.keys for s in joined)
        padded = len(joined) * max(s.size for s in joined) * max(s.keys for s in joined)
        fits = (
            padded <= PADDED * needed and padded <= MOST_BATCH and segment.size * segment.keys <= MOST_SCORES
        )
        if batches and fits:
            batches[-1].append(segment)
        else:
            batches.append([segment])
    return batches


@dataclass(frozen=True)
class Batch:
    """The places of a batch of N segments, at most T queries over S keys, in a packed row of L tokens.

    Attributes:
        segments: the segments.
        tokens: L.
        window: the layers' sliding window.
    """

    segments: Sequence[Segment]
    tokens: int
    window: int | None

    @cached_property
    def sizes(self) -> tuple[int, int, int]:
        """N, T and S."""
        return len(self.segments), max(s.size for s in self.segments), max(s.keys for s in self.segments)

    @cached_property
    def rows(self) -> Tensor:
        """The place in the row of each query of each segment, without padding. int64 (M,)"""
        return torch.cat([torch.arange(s.start, s.start + s.size) for s in self.segments])

    @cached_property
    def queries(self) -> Tensor:
        """The place of each query; L for padding. int64 (N, T)"""
        places = torch.full(self.sizes[:2], self.tokens)
        for row, s in zip(places, self.segments, strict=True):
            row[: s.size] = torch.arange(s.start, s.start + s.size)
        return places

    @cached_property
    def keys(self) -> Tensor:
        """The place of each key, in the order of their positions; L for padding. int64 (N, S)"""
        places = torch.full((self.sizes[0], self.sizes[2]), self.tokens)
        for row, s in zip(places, self.segments, strict=True):
            parts = [*s.seen, (s.start, s.size)]
            row[: s.keys] = torch.cat([torch.arange(start, start + size) for start, size in parts])
        return places

    @cached_property
    def uses(self) -> Tensor:
        """For each token the places in `keys` where it is a key; N * S for none. int64 (uses, L)"""
        flat = self.keys.flatten()
        used = flat.bincount(minlength=self.tokens + 1)
        sorted_places = flat.argsort(stable=True)
        starts = used.cumsum(0) - used
        places = torch.full((int(used[: self.tokens].max()), self.tokens), len(flat))
        for use in range(len(places)):
            has = (used[: self.tokens] > use).nonzero()[:, 0]
            places[use, has] = sorted_places[starts[has] + use]
        return places

    @cached_property
    def bias(self) -> Tensor:
        """The bias of the scores: 0 where a query sees a key, else -inf. float32 (N, T, S)"""
        count, most, _ = self.sizes
        before = torch.tensor([s.before for s in self.segments])[:, None]
        at = before + torch.arange(most)  # a padded query sees some key, so that its softmax is finite
        key = torch.arange(self.sizes[2]).expand(count, -1)
        seen = (key[:, None] <= at[:, :, None]) & (self.keys < self.tokens)[:, None]
        if self.window is not None:
            seen &= at[:, :, None] - key[:, None] < self.window
            seen[:, :, 0] |= ~seen.any(-1)
        return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)


class Heads:
    """A batch's indices for a number of heads; the same for all layers.

    Args:
        batch: the batch.
        heads, kv_heads: numbers of heads of the queries and of the keys.
    """

    def __init__(self, batch: Batch, heads: int, kv_heads: int) -> None:
        count, most, keys = batch.sizes
        group, tokens = heads // kv_heads, batch.tokens
        self.heads, self.kv_heads, self.tokens = heads, kv_heads, tokens
        self.queries = _rows(batch.queries, heads, tokens)
        self.keys = _rows(batch.keys, kv_heads, tokens)
        # Inverse directions: from the batch, whose rows are (n, head, place), to the tokens, (place, head).
        n, t = (batch.queries < tokens).nonzero(as_tuple=True)
        head = torch.arange(heads)
        self.outputs = ((n[:, None] * heads + head) * most + t[:, None]).flatten()
        self.places = (batch.rows[:, None] * heads + head).flatten()
        head = torch.arange(kv_heads)
        padding = count * kv_heads * keys
        self.uses = [
            torch.where(
                (use < count * keys)[:, None],
                ((use // keys)[:, None] * kv_heads + head) * keys + (use % keys)[:, None],
                padding,
            ).flatten()
            for use in batch.uses
        ]
        self.query_shape, self.key_shape = (count * kv_heads, group * most), (count * kv_heads, keys)
        self.scores = count, kv_heads, group, most, keys
        self.bias = batch.bias[:, None, None]


def _rows(places: Tensor, heads: int, tokens: int) -> Tensor:
    """Return indices into rows (place, head) in the order (n, head, place); padding reads the zero row."""
    rows = places[:, None] * heads + torch.arange(heads)[:, None]
    return rows.clamp_(max=tokens * heads).flatten()


def batched_attention(query: Tensor, key: Tensor, value: Tensor, heads: Heads, scaling: float) -> Tensor:
    """Compute the attention of a batch.

    query (1, heads, L, D), key and value (1, kv heads, L, D); the result is (M, heads, D), in the order of
    `Batch.rows`.
    """
    output: Tensor = _Batched.apply(query, key, value, heads, scaling)  # type: ignore[no-untyped-call]
    return output


def _taken(tensor: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return rows of a packed tensor as a batch. tensor (1, heads, L, D), result (*shape, D)"""
    size = tensor.shape[-1]
    flat = tensor[0].transpose(0, 1).reshape(-1, size)
    rows = flat.new_zeros(len(flat) + 1, size)
    rows[:-1] = flat
    return rows.index_select(0, index).view(*shape, size)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Batched(torch.autograd.Function):
    """softmax(scaling Q K^T + bias) V; saves its inputs and computes the weights again in backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, heads: Heads, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.heads, ctx.scaling = heads, scaling
        queries = _taken(query, heads.queries, heads.query_shape)
        keys, values = (_taken(t, heads.keys, heads.key_shape) for t in (key, value))
        weights = _weights(queries, keys, heads, scaling)
        output = torch.bmm(weights.to(values.dtype), values).view(-1, query.shape[-1])
        return output.index_select(0, heads.outputs).view(-1, heads.heads, query.shape[-1])

    @staticmethod
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        heads, size = ctx.heads, query.shape[-1]
        queries = _taken(query, heads.queries, heads.query_shape)
        keys, values = (_taken(t, heads.keys, heads.key_shape) for t in (key, value))
        weights = _weights(queries, keys, heads, ctx.scaling)
        d_out = queries.new_zeros(len(queries) * queries.shape[1], size)
        d_out.index_copy_(0, heads.outputs, d_output.reshape(-1, size))
        d_out = d_out.view(queries.shape)
        d_value = torch.bmm(weights.to(d_out.dtype).transpose(1, 2), d_out)
        d_weights = torch.bmm(_wide(d_out), _wide(values).transpose(1, 2))
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).to(d_out.dtype)
        d_query = torch.bmm(d_scores, keys).view(-1, size).index_select(0, heads.outputs).mul_(ctx.scaling)
        d_key = torch.bmm(d_scores.transpose(1, 2), queries).mul_(ctx.scaling)
        by_token = query.new_zeros(heads.tokens * heads.heads, size)
        return (
            _packed(by_token.index_copy_(0, heads.places, d_query), query),
            _packed(_summed(d_key, heads.uses), key),
            _packed(_summed(d_value, heads.uses), value),
            None,
            None,
        )


def _weights(queries: Tensor, keys: Tensor, heads: Heads, scaling: float) -> Tensor:
    """Return the weights in float32. (N * kv heads, group * T, S)"""
    scores = torch.bmm(_wide(queries) * scaling, _wide(keys).transpose(1, 2))
    scores.view(heads.scores).add_(heads.bias)
    return torch.softmax(scores, -1, out=scores)


def _summed(gradient: Tensor, uses: Sequence[Tensor]) -> Tensor:
    """Sum a token's gradients over its uses as a key, in float32.

    (N * kv heads, S, D) to (L * kv heads, D)
    """
    flat = gradient.view(-1, gradient.shape[-1])
    rows = flat.new_zeros(len(flat) + 1, flat.shape[-1])
    rows[:-1] = flat
    total = _wide(rows.index_select(0, uses[0]))
    for use in uses[1:]:
        total += rows.index_select(0, use)
    return total


def _packed(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows (L * heads, D) in the shape and the format of a packed tensor, (1, heads, L, D)."""
    return rows.view(1, like.shape[2], like.shape[1], -1).transpose(1, 2).to(like.dtype)
