"""LoRA adapters: new adapters, and adapters that come with a model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from palate.config import ModelConfig
from palate.errors import ModelError
from palate.model.loaded import Head

CLASSIFIER = "SEQ_CLS"
"""peft's name for the task of an adapter with a reward head."""


_STATE_SPACE = frozenset({"mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"})
"""Model types with layers that no adapter reaches: their blocks read the weights, not the layer's output."""

_READ_DIRECTLY = frozenset({"out_proj", "x_proj", "dt_proj", "conv1d"})
"""Names of these layers in their blocks. peft refuses two of them; the other two would be without effect."""

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "lm_head.weight", "embed_in.weight", "embed_out.weight")
"""Ends of the names under which an adapter stores whole embeddings."""


def fresh_adapter(network: Any, cfg: ModelConfig, head: Head) -> Any:
    """Add a new LoRA adapter to all linear layers; return peft's wrapper of the network.

    Layers of state-space blocks whose weights the block reads itself stay as they are: an adapter on them
    would have no effect.
    """
    lora = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules=_adaptable(network),
        lora_dropout=0.0,
        task_type="CAUSAL_LM" if head == "lm" else CLASSIFIER,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),  # GPT-2's layers
    )
    return get_peft_model(network, lora, autocast_adapter_dtype=False)


def _adaptable(network: Any) -> str | list[str]:
    """Return the layers for a fresh adapter: the linear layers that it can adapt, without the head."""
    if network.config.model_type not in _STATE_SPACE:
        return "all-linear"
    head = network.get_output_embeddings()
    linear = (
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    return sorted({name for name in linear if name.rpartition(".")[2] not in _READ_DIRECTLY})


def embedding_rows(adapter: str) -> int | None:
    """Return the rows of the whole embeddings in an adapter's directory; None if it has no embeddings."""
    with safe_open(str(Path(adapter) / "adapter_model.safetensors"), "pt") as weights:
        rows = [
            weights.get_slice(name).get_shape()[0]
            for name in weights.keys()  # noqa: SIM118 - not a dict
            if name.endswith(_EMBEDDINGS)
        ]
    return max(rows, default=None)


def untie(network: Any, adapter: str) -> None:
    """Give the head a weight of its own if an adapter changes the head or the embedding it shares one with.

    An adapter that is added to a shared weight would change both; as an adapter it changes one.
    """
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    config = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    shared = [name for name, module in network.named_modules() if module in (head, embedding)]
    if any(
        _names(config.get(part), name) for part in ("target_modules", "modules_to_save") for name in shared
    ):
        head.weight = nn.Parameter(embedding.weight.detach().clone())
        network.config.get_text_config().tie_word_embeddings = False
        network.config.tie_word_embeddings = False


def _names(targets: str | list[str] | None, module: str) -> bool:
    """Return whether the targets in an adapter's configuration, a pattern or a list, name a module."""
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


def continued_adapter(network: Any, adapter: str, head: Head, *, trainable: bool) -> Any:
    """Add the adapter of a directory to a network; return peft's wrapper of the network.

    For a reward model, the adapter of a language model gets a new head.

    Raises:
        ModelError: the adapter changes layers that a reward model does not have.
    """
    config = PeftConfig.from_pretrained(adapter)
    if head == "lm" or config.task_type == CLASSIFIER:
        # By default peft reads the file onto the first GPU, in every process.
        return PeftModel.from_pretrained(
            network, adapter, is_trainable=trainable, autocast_adapter_dtype=False, torch_device="cpu"
        )
    config.task_type, config.inference_mode = CLASSIFIER, False
    peft = get_peft_model(network, config, autocast_adapter_dtype=False)
    with_head = get_peft_model_state_dict(peft, save_embedding_layers=False)
    weights = {**with_head, **load_peft_weights(adapter, device="cpu")}
    unexpected = set_peft_model_state_dict(peft, weights).unexpected_keys
    if unexpected:
        raise ModelError(f"adapter {adapter!r} changes {unexpected[0]}, which a reward model does not have")
    return peft


def settle(peft: Any, dtype: torch.dtype) -> None:
    """Give all parameters of an adapted network one number format, and switch dropout off."""
    # Only parameters: buffers, such as the frequencies of rotary embeddings, stay in float32.
    for parameter in peft.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in peft.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # an existing adapter may have dropout
