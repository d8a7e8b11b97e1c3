"""Packed rows: each prompt once for all its completions, without padding.

One row holds prompt, completion, completion, ..., prompt, completion, ... A completion sees its prompt and
itself, and its positions continue from the prompt's end, so the results equal those of padded batches.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from palate.model.fast.attention import Attention
from palate.model.fast.batched import Batches
from palate.model.fast.flex import FEW_SEGMENTS, Blocks, trusted
from palate.model.fast.segments import Segments, Shape


class PackedLayout:
    """Attention over the segments of a packed row.

    Args:
        records: for each record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.records = records
        self.sizes = [size for prompt, completions in records for size in (prompt, *completions)]
        self._segments, self._blocks, self._batches = Segments(records), Blocks(records), Batches(records)
        # A row of prompts only is a series of plain causal attentions, which have their own kernels.
        self._many = len(self.sizes) >= FEW_SEGMENTS and len(self.sizes) > len(records)

    @cached_property
    def numbers(self) -> Tensor:
        """The records as numbers: prompt, number of completions, and each completion. int64"""
        return torch.tensor([n for prompt, rest in self.records for n in (prompt, len(rest), *rest)])

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store a layer's keys and values, (1, L, kv heads, D), where a layout has to."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        if how.shares_keys(query) and query.dtype.itemsize < 4:
            return self._batches.attend(query, key, value, how)
        way = self._blocks if self._many and trusted(query, key, how) else self._segments
        return way.attend(query, key, value, how)


def positions(records: Shape) -> Tensor:
    """Return the position of every token of a packed row. int64 (1, L)"""
    parts = [
        torch.arange(start, start + size)
        for prompt, completions in records
        for start, size in ((0, prompt), *((prompt, size) for size in completions))
    ]
    return torch.cat(parts)[None]


def predicting(records: Shape) -> Tensor:
    """Return the index of the hidden state that predicts each completion token, in order. int64 (M,)

    For a completion's first token it is the prompt's last state, for the others the state before.
    """
    parts: list[Tensor] = []
    start = 0
    for prompt, completions in records:
        last, start = start + prompt - 1, start + prompt
        for size in completions:
            parts += [torch.tensor([last]), torch.arange(start, start + size - 1)]
            start += size
    return torch.cat(parts)


def ending(records: Shape) -> Tensor:
    """Return the index of the last hidden state of each completion, in order. int64 (N,)

    For a completion without tokens it is the prompt's last state.
    """
    ends: list[int] = []
    start = 0
    for prompt, completions in records:
        last, start = start + prompt - 1, start + prompt
        for size in completions:
            start += size
            ends.append(start - 1 if size else last)
    return torch.tensor(ends)
