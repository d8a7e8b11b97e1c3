"""A copy of a network for sampling, with its LoRA adapter merged into the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners import lora
from torch import nn


class MergedCopy:
    """A network without adapters that equals the adapted network, with fewer and larger products.

    It shares all weights without an adapter with the live network, and copies only the adapted matrices.

    Args:
        network: the live network; see `can_merge`.
    """

    def __init__(self, network: Any) -> None:
        self.network = network
        self._copy = _without_adapters(network)
        self._revision: int | None = None

    @torch.no_grad()
    def at(self, revision: int) -> Any:
        """Return the copy with the current weights; they are merged again if `revision` has changed."""
        if self._revision != revision:
            for name, layer in _adapted(self.network):
                weight = layer.get_base_layer().weight
                total = weight.float() + sum(
                    layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
                )
                self._copy.get_submodule(name).weight.copy_(total)
            self._revision = revision
        return self._copy


def can_merge(network: Any) -> bool:
    """Return whether merging the adapter into the weights gives the same function.

    It does not in bfloat16: a new adapter changes weights by less than their resolution, so rounding would
    remove most of the change. Adapters on the parameters of a mixture of experts are not merged.
    """
    return all(
        isinstance(layer, lora.Linear | lora.Embedding)
        and layer.get_base_layer().weight.dtype == torch.float32
        and adapter not in layer.lora_variant  # DoRA and others, which are not sums
        and not layer.lora_bias.get(adapter)
        for _, layer in _adapted(network)
        for adapter in layer.active_adapters
    )


def _adapted(network: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, lora.LoraLayer)]


def _without_adapters(network: Any) -> Any:
    """Return a network with plain layers instead of adapted layers, sharing all other weights."""
    adapted = _adapted(network)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    shared |= {id(layer): copy.copy(layer.get_base_layer()) for _, layer in adapted}
    bare = copy.deepcopy(network, shared)
    for name, _ in adapted:
        layer = bare.get_submodule(name)
        layer._parameters = dict(layer._parameters)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return bare.eval()
