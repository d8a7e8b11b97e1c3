"""Small models and annotators for tests, which run offline in seconds. Public for authors of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from palate.config import LearnerConfig
from palate.learn import Policy
from palate.types import Completion, Prompt

PAD, END, BOS = "<pad>", "<end>", "<bos>"

CHAT = (
    "{% for m in messages %}<bos>{{ m['role'] }}:{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
)
"""A small chat template."""


def byte_tokenizer(*, chat: bool = False, pad_is_end: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the 256 bytes and three special tokens; it preserves any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, PAD, END, BOS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=BOS,
        pad_token=END if pad_is_end else PAD,
        additional_special_tokens=[PAD],
        model_max_length=256,
    )
    if chat:
        wrapped.chat_template = CHAT
    return wrapped


KINDS = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mistral", "olmo2", "phi",
    "bloom",
)  # fmt: skip
"""Architectures that `tiny_model` can make."""


def tiny_config(kind: str = "llama", **changes: Any) -> PreTrainedConfig:
    """Return a configuration of two layers, 32 wide, with the byte tokenizer's vocabulary and `changes`."""
    common = {"vocab_size": 259, "bos_token_id": 258, "eos_token_id": 257, "pad_token_id": 256}
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    limit = {"max_position_embeddings": 256}
    grouped = {"num_key_value_heads": 2, **limit}
    window = {"sliding_window": 8, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    own: dict[str, dict[str, Any]] = {
        "llama": {**size, **grouped, "tie_word_embeddings": True},
        "qwen2": {**size, **grouped, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        "qwen3": {**size, **grouped, "tie_word_embeddings": True, "head_dim": 8},
        "gemma2": {**size, **grouped, **window, "query_pre_attn_scalar": 8},  # soft caps on scores and logits
        "gemma3_text": {**size, **grouped, **window, "query_pre_attn_scalar": 8},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        "gpt_neox": {**size, **limit},
        "mistral": {**size, **grouped, "sliding_window": 8},
        "olmo2": {**size, **grouped},
        "phi": {**size, **limit},
        "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    }
    return AutoConfig.for_model(kind, **common | own[kind] | changes)


def tiny_model(
    directory: Path, *, kind: str = "llama", chat: bool = False, seed: int = 0, **changes: Any
) -> str:
    """Save a random tiny model with its tokenizer, in float32, and return its directory."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(kind, **changes))
    model.save_pretrained(directory)
    byte_tokenizer(chat=chat).save_pretrained(directory)
    return str(directory)


def tiny_policy(
    directory: Path,
    *,
    lr: float = 1e-2,
    total_steps: int = 100,
    model: dict[str, Any] | None = None,
    **optim: Any,
) -> Policy:
    """Return a policy of the model in `directory`; by default float32, on the CPU, without LoRA."""
    fixed = {"model": str(directory), "dtype": "float32", "device": "cpu", "lora": False, "lr": lr}
    cfg = LearnerConfig.model_validate(fixed | optim | (model or {}))
    return Policy.load(cfg, total_steps=total_steps)


@dataclass
class ScriptedScorer:
    """A scorer that applies a function to each completion's text."""

    score: Callable[[str], float | None]
    name: str = "scripted"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion."""
        return [self.score(completion.text) for completion in completions]


@dataclass
class ScriptedJudge:
    """A judge that applies a function to the two texts."""

    prefer: Callable[[str, str], float | None]
    name: str = "scripted"

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) for each pair."""
        return [self.prefer(first.text, second.text) for first, second in pairs]
