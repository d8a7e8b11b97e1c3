"""An attention function for the registry of transformers that follows a layout instead of a mask.

A fast path opens `following(network)`, which makes every layer of the network call `attend` below, and
passes its layout through the model's keyword arguments. The layout computes the attention, since it knows
the keys that each query may see. transformers builds no mask for this attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "palate_layout"


class Layout(Protocol):
    """Defines the keys that each query sees, and computes the attention."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """Compute the attention of one layer.

        query (B, heads, T, D), key and value (B, kv heads, T, D); the output is (B, T, heads, D).
        """


class Attention:
    """Options of a layer's attention: scaling, sliding window and soft cap."""

    def __init__(self, scaling: float, window: int | None, softcap: float | None) -> None:
        self.scaling = scaling
        self.window = window
        self.softcap = softcap

    def scores_cap(self, scores: Tensor) -> Tensor:
        """Return soft-capped scores, as in Gemma 2."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def shares_keys(self, query: Tensor) -> bool:
        """Return whether keys may have fewer heads than the query; only CPUs have a fast kernel for that."""
        return query.device.type == "cpu" and self.softcap is None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Compute attention over all heads, causal if `mask` is None. mask: bool (T, S), True if visible."""
        if self.softcap is None:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        if mask is None:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        scores = self.scores_cap(query @ key.transpose(-1, -2) * self.scaling)
        return scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value


class NotUnderstood(Exception):  # noqa: N818 - a signal between our own parts, never shown
    """A layer needs an option that layouts do not support."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    palate_layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of a layer with its layout; layers call this within `following`."""
    if palate_layout is None or rest.get("s_aux") is not None or rest.get("position_bias") is not None:
        raise NotUnderstood(type(module).__name__)
    how = Attention(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    return palate_layout.attend(module.layer_idx, query, key, value, how), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, attend)


@contextmanager
def following(network: Any) -> Iterator[None]:
    """Make the network's layers follow layouts within the context.

    Keep it open until backward has finished, since recomputed layers need it too.
    """
    configs = {id(c): c for c in (network.config, network.config.get_text_config())}.values()
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
