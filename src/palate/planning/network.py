"""The size of a model from its configuration, without its weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from palate.config import ModelConfig
from palate.given import GivenModel
from palate.model.explain import explained
from palate.model.fast.lean import WINDOW
from palate.model.rollouts import parallel_rows
from palate.model.source import find_source


@dataclass(frozen=True)
class Network:
    """The sizes of a causal language model.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_size, vocabulary: its dimensions.
        parameters: number of weights; tied weights count once.
        matrices: inputs and outputs of every linear layer except the head.
        lean: its layers run in Palate's own code, which saves fewer activations.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    parameters: int
    matrices: tuple[tuple[int, int], ...]
    lean: bool

    @property
    def in_products(self) -> int:
        """Weights that multiply every token, without the head."""
        return sum(inputs * outputs for inputs, outputs in self.matrices)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.vocabulary * self.hidden

    def adapter(self, rank: int) -> int:
        """Return the number of weights of a LoRA adapter on all linear layers but the head."""
        return sum(rank * (inputs + outputs) for inputs, outputs in self.matrices)


def network_of(cfg: ModelConfig) -> Network:
    """Return the sizes of the model that a configuration names; its weights are not loaded.

    Raises:
        ModelError: the name has no usable model.
    """
    if isinstance(cfg.model, GivenModel):
        config = cfg.model.network.config
    else:
        base, _ = find_source(cfg.model, "lm", trainable=True, base=cfg.base)
        with explained(cfg.model):
            config = AutoConfig.from_pretrained(base, trust_remote_code=cfg.trust_remote_code)
    return network_from(config)


def network_from(config: Any) -> Network:
    """Return the sizes of the language model with a configuration of transformers."""
    text = config.get_text_config()
    quiet = logging.getLogger("transformers")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config)
    finally:
        quiet.setLevel(level)
    head = network.get_output_embeddings()
    linear = [m for m in network.modules() if isinstance(m, nn.Linear) and m is not head]
    matrices = [(m.in_features, m.out_features) for m in linear] or [
        (m.weight.shape[0], m.weight.shape[1])  # GPT-2's layers
        for m in network.modules()
        if type(m).__name__ == "Conv1D"
    ]
    hidden = _first(text, "hidden_size", "n_embd")
    heads = _first(text, "num_attention_heads", "n_head")
    return Network(
        layers=_first(text, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_size=getattr(text, "head_dim", None) or hidden // heads,
        vocabulary=network.get_input_embeddings().weight.shape[0],
        parameters=sum(p.numel() for p in network.parameters()),
        matrices=tuple(matrices),
        lean=type(network.base_model).__name__.removesuffix("Model") in WINDOW,
    )


def parallel(network: Network, n: int, tokens: int) -> int:
    """Return the default number of completions sampled in parallel; see `palate.model.rollouts`."""
    sizes = SimpleNamespace(
        num_attention_heads=network.heads,
        num_key_value_heads=network.kv_heads,
        head_dim=network.head_size,
        hidden_size=network.hidden,
        num_hidden_layers=network.layers,
    )
    return parallel_rows(SimpleNamespace(get_text_config=lambda: sizes), n, tokens)


def _first(config: Any, *names: str) -> int:
    return int(next(value for name in names if (value := getattr(config, name, None)) is not None))
