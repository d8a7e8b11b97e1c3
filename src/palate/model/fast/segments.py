"""Attention of a packed row segment by segment, for CPUs and as the standard to test kernels against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palate.model.fast.attention import Attention

Shape = Sequence[tuple[int, Sequence[int]]]
"""For each record, the length of its prompt and of each completion."""


class Segments:
    """Attention in which prompts see themselves, and completions see their prompt and themselves.

    Args:
        records: for each record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.records = records
        self.sizes = [size for prompt, completions in records for size in (prompt, *completions)]
        self._masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """Compute attention. query (1, heads, L, D), key and value (1, kv heads, L, D); (1, L, heads, D)"""
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads != kv_heads and not how.shares_keys(query):
            key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        queries, keys, values = (iter(torch.split(t, self.sizes, dim=2)) for t in (query, key, value))
        outputs: list[Tensor] = []
        for prompt, completions in self.records:
            prompt_key, prompt_value = next(keys), next(values)
            outputs.append(
                how(next(queries), prompt_key, prompt_value, self._seen(0, prompt, how.window, query.device))
            )
            for size in completions:
                mask = self._seen(prompt, size, how.window, query.device)
                outputs.append(
                    how(
                        next(queries),
                        torch.cat((prompt_key, next(keys)), dim=2),
                        torch.cat((prompt_value, next(values)), dim=2),
                        mask,
                    )
                )
        return torch.cat(outputs, dim=2).transpose(1, 2)

    def _seen(self, before: int, size: int, window: int | None, device: torch.device) -> Tensor | None:
        """Return the mask of `seen_by`, computed once for all layers."""
        key = before, size, window
        if key not in self._masks:
            self._masks[key] = seen_by(before, size, window, device)
        return self._masks[key]


def seen_by(before: int, size: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the mask of `size` positions over before + size keys; None for plain causal attention."""
    if before == 0 and (window is None or window >= size):
        return None
    at = torch.arange(before, before + size, device=device)[:, None]
    key = torch.arange(before + size, device=device)[None]
    seen = key <= at
    return seen if window is None else seen & (at - key < window)
