"""One copy of frozen weights for several models on the same base.

With LoRA, policy, value function and reward model are adapters on one base, whose weights do not change. Each
model keeps its own layers and adapter, so none is switched on or off for another; only the frozen tensors are
shared.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from palate.model.loaded import LoadedModel

FROZEN: WeakSet[nn.Module] = WeakSet()
"""Networks in memory that were loaded for scoring or sampling alone, such as a reward model's."""


def share_frozen(model: LoadedModel, base: LoadedModel) -> int:
    """Replace the frozen weights of `model` by those of `base` that are the same, number by number.

    Args:
        model: loses its copies; what it computes stays the same to the last bit.
        base: another model of the same architecture; a weight counts if both have frozen it.

    Returns:
        The number of bytes that are held once instead of twice.
    """
    return _share(model.network, base)


def _share(network: nn.Module, base: LoadedModel) -> int:
    frozen = {_place(name): p for name, p in base.network.named_parameters() if not p.requires_grad}
    saved = 0
    for name, own in list(network.named_parameters()):
        theirs = frozen.get(_place(name))
        if own.requires_grad or theirs is None or theirs is own or not _same(own, theirs):
            continue
        module, _, attribute = name.rpartition(".")
        setattr(network.get_submodule(module), attribute, theirs)
        saved += own.numel() * own.element_size()
    return saved


def share_loaded(base: LoadedModel) -> int:
    """Let every model that was loaded for scoring or sampling alone take the frozen weights of `base`.

    Returns:
        The number of bytes that are held once instead of twice.
    """
    return sum(_share(network, base) for network in list(FROZEN) if network is not base.network)


def weight_bytes(*models: LoadedModel) -> int:
    """Return the bytes of all weights of the models, those that they share once."""
    distinct = {id(p): p for model in models for p in model.network.parameters()}
    return sum(p.numel() * p.element_size() for p in distinct.values())


def _place(name: str) -> str:
    """Return a weight's name without the layer that an adapter puts around it."""
    return name.replace(".base_layer.", ".")


def _same(one: nn.Parameter, other: nn.Parameter) -> bool:
    if isinstance(one, DTensor) or isinstance(other, DTensor):
        return False  # parts of weights belong to one model
    alike = (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(one, other)
