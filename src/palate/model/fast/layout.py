"""Packed rows: each prompt once for all its completions, no padding.

One row holds prompt, completion, completion, ..., prompt, completion, ... A completion sees its prompt and
itself, and its positions go on from the prompt's end; so the numbers are those of the padded way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palate.model.fast.attention import Attention
from palate.model.fast.flex import FEW_SEGMENTS, Blocks, trusted
from palate.model.fast.segments import Segments, Shape


class PackedLayout:
    """Segments of a packed row and what they see.

    Args:
        records: per record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.sizes = [size for prompt, completions in records for size in (prompt, *completions)]
        self._segments, self._blocks = Segments(records), Blocks(records)
        # Prompts alone are as many plain causal attentions, for which there are kernels.
        self._many = len(self.sizes) >= FEW_SEGMENTS and len(self.sizes) > len(records)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        way = self._blocks if self._many and trusted(query, key, how) else self._segments
        return way.attend(query, key, value, how)


def positions(records: Shape) -> Tensor:
    """Position of every token of a packed row. int64 (1, L)"""
    parts = [
        torch.arange(start, start + size)
        for prompt, completions in records
        for start, size in ((0, prompt), *((prompt, size) for size in completions))
    ]
    return torch.cat(parts)[None]


def predicting(records: Shape) -> Tensor:
    """Index of the hidden state that predicts each completion token, in order. int64 (M,)

    For a completion's first token it is the prompt's last, for the others the one before.
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
    """Index of the last hidden state of each completion, in order. int64 (N,)

    Of a completion without tokens it is the prompt's last.
    """
    ends: list[int] = []
    start = 0
    for prompt, completions in records:
        last, start = start + prompt - 1, start + prompt
        for size in completions:
            start += size
            ends.append(start - 1 if size else last)
    return torch.tensor(ends)
