"""LoRA adapters: new adapters, and adapters that come with a model."""

from __future__ import annotations

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
from torch import nn
from transformers.pytorch_utils import Conv1D

from palate.config import ModelConfig
from palate.errors import ModelError
from palate.model.loaded import Head

CLASSIFIER = "SEQ_CLS"
"""peft's name for the task of an adapter with a reward head."""


def fresh_adapter(network: Any, cfg: ModelConfig, head: Head) -> Any:
    """Add a new LoRA adapter to all linear layers; return peft's wrapper of the network."""
    lora = LoraConfig(
        r=cfg.lora_rank,
        lora_alpha=cfg.lora_alpha,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM" if head == "lm" else CLASSIFIER,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in network.modules()),  # GPT-2's layers
    )
    return get_peft_model(network, lora, autocast_adapter_dtype=False)


def continued_adapter(network: Any, adapter: str, head: Head, *, trainable: bool) -> Any:
    """Add the adapter of a directory to a network; return peft's wrapper of the network.

    For a reward model, the adapter of a language model gets a new head.

    Raises:
        ModelError: the adapter changes layers that a reward model does not have.
    """
    config = PeftConfig.from_pretrained(adapter)
    if head == "lm" or config.task_type == CLASSIFIER:
        return PeftModel.from_pretrained(
            network, adapter, is_trainable=trainable, autocast_adapter_dtype=False
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
