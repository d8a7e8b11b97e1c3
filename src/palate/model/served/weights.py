"""Whole weights for a server: the files that it loads, and a test that it computes with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from palate.model.batched import batched_logps
from palate.model.loaded import LoadedModel
from palate.types import Completion, Example, Prompt

LARGEST_GAP = {torch.float32: 1e-2}
"""Largest allowed mean difference of a token's log-probability between server and policy, in nats, by number
format; rounding alone gives about 1e-4 in float32."""

OTHER_GAP = 0.15
"""The same for narrower formats, in which rounding gives about 0.02."""


def is_tied(network: Any) -> bool:
    """Return whether a network's head shares the weights of its embedding."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def write_untied(network: Any, path: Path) -> None:
    """Write a network whose head has a weight of its own, with the values of the shared one."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(network.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.architectures = [type(network).__name__]
    config.save_pretrained(path)


@torch.no_grad()
def difference(
    model: LoadedModel, prompt_ids: tuple[int, ...], tokens: list[int], logps: list[float]
) -> float:
    """Return the mean difference between a model's log-probabilities of tokens and those given, in nats."""
    record = Example(Prompt("", token_ids=prompt_ids), Completion("", tuple(tokens)))
    (ours,) = batched_logps(model, [record], len(prompt_ids) + len(tokens)).rows()
    return float((ours.cpu() - torch.tensor(logps)).abs().mean())


def allowed(model: LoadedModel) -> float:
    """Return the largest `difference` that rounding explains."""
    return LARGEST_GAP.get(model.dtype, OTHER_GAP)
