"""The test of a model that is too large for one device, on a copy of its first layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from palate.model.codec import Codec
from palate.model.fast.probe import FOREIGN, disagreement
from palate.model.loaded import Head

FEWEST = 2
"""Layers of the copy, if they are all of one kind."""


def few_disagree(network: Any, codec: Codec, head: Head, device: torch.device) -> str | None:
    """Return why fast and plain results differ for a network's first layers on a device; None if they agree.

    Args:
        network: the network, on any device; it stays as it is.
        codec, head: see `disagreement`.
        device: the device that the whole network will compute on.
    """
    copied = first_layers(network, device)
    if copied is None:
        return "its layers are not in one list"
    try:
        return disagreement(copied, codec, head)
    except (*FOREIGN, KeyError) as error:  # layers may need others that the copy lacks
        return f"its first layers do not work alone ({type(error).__name__}: {str(error)[:80]})"


def first_layers(network: Any, device: torch.device) -> Any | None:
    """Return a copy of a network with its first layers alone, at least one of each kind, on a device.

    None means that the network has no list of layers, or several.
    """
    count = network.config.get_text_config().num_hidden_layers
    lists = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    lists = [m for m in lists if not any(m is not other and m in set(other.modules()) for other in lists)]
    if len(lists) != 1:
        return None
    (layers,) = lists
    kinds = [_kind(network.config, i, layer) for i, layer in enumerate(layers)]
    few = min(count, max(FEWEST, *(kinds.index(kind) + 1 for kind in kinds)))
    left_out = {id(p) for layer in layers[few:] for p in layer.parameters()}
    new: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(device, copy=True), requires_grad=p.requires_grad)
        for p in network.parameters()
        if id(p) not in left_out
    }
    new[id(layers)] = nn.ModuleList(copy.deepcopy(list(layers[:few]), new))
    copied = copy.deepcopy(network, new)
    text = copied.config.get_text_config()
    text.num_hidden_layers = few
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:few]
    return copied.to(device)


def _kind(config: Any, i: int, layer: nn.Module) -> tuple[str, tuple[str, ...]]:
    """Return a layer's kind: its type in the configuration, and its parts."""
    types = getattr(config.get_text_config(), "layer_types", None)
    parts = tuple(f"{name} {type(part).__name__}" for name, part in layer.named_modules())
    return ("" if types is None else types[i]), parts
