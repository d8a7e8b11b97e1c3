"""A learner's state on disk: the tensors that an update changes, as safetensors, and a few numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from palate.errors import RunError
from palate.learn.learner import POLICY, Learner
from palate.learn.shards import FILE, SavedState
from palate.model import LoadedModel
from palate.model.sharded import whole_tensor
from palate.world import current


def save_state(learner: Learner, directory: Path) -> dict[str, int]:
    """Write weights and moments in the optimizer's precision; return the numbers for `restore_state`."""
    tensors = {name: tensor.contiguous() for name, tensor in learner.optimizer.state().items()}
    save_file(tensors, directory / FILE)
    return learner.numbers()


def require_fit(learner: Learner, directory: Path) -> None:
    """Raise RunError unless the state that `save_state` wrote has the shapes of the learner's weights.

    It reads only the file's header, so all learners can be checked before the first one is restored.
    """
    shapes = SavedState(directory).shapes
    saved = {n.removeprefix("weight/"): shape for n, shape in shapes.items() if n.startswith("weight/")}
    own = {n: tuple(m.shape) for n, m in zip(learner.optimizer.names, learner.optimizer.master, strict=True)}
    if saved != own:
        different = sorted(set(saved.items()) ^ set(own.items()))[0][0]
        raise RunError(
            f"checkpoint {str(directory)!r} does not fit the model: {different} differs; expected the state "
            f"of {learner.model.source}"
        )


def restore_state(learner: Learner, directory: Path, numbers: Mapping[str, Any]) -> None:
    """Restore a learner to the state at `save_state`; existing snapshots of it do not change.

    Raises:
        RunError: the state belongs to another model or adapter.
    """
    require_fit(learner, directory)
    saved, world = SavedState(directory), current()
    place = (world.rank, world.size) if learner.model.sharded else (0, 1)
    tensors = {name: saved.part(name, *place) for name in saved.shapes}
    learner.restore(tensors, version=numbers["version"], updates=numbers["updates"])
    learner.skipped, learner.skipped_in_a_row = numbers["skipped"], numbers["skipped_in_a_row"]


def state_bytes(learner: Learner) -> int:
    """Return the approximate size of a learner's checkpoint on disk, in bytes."""
    trained = sum(p.numel() * p.element_size() for p in learner.optimizer.live)
    masters = sum(m.numel() * m.element_size() for m in learner.optimizer.master)
    whole = sum(p.numel() * p.element_size() for p in learner.model.network.parameters())
    return 3 * masters + (trained if learner.model.peft is not None else whole)


def fingerprint(learner: Learner) -> str:
    """Return the SHA-256 of a learner's weights, names and formats, including an adapter's."""
    model = learner.model
    return weights_hash(model.network, model.dtype if model.sharded else None)


def weights_hash(network: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the SHA-256 of a network's weights, names and formats.

    Args:
        network: the network.
        dtype: the format that counts for all weights; that of each by default. Sharded weights may be wider.
    """
    return _hashed(sorted(network.named_parameters()), dtype)


def start_hash(model: LoadedModel) -> str:
    """Return the SHA-256 of the weights that a model samples from before training.

    A new adapter changes nothing at the start, so a model with it has the hash of the same model without it.
    """
    named = [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in model.network.named_parameters()
        if not (model.fresh_adapter and ".lora_" in name)
    ]
    return _hashed(sorted(named), model.dtype if model.sharded else None)


def _hashed(named: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None) -> str:
    digest = hashlib.sha256()
    for name, parameter in named:
        own = dtype or parameter.dtype
        digest.update(f"{name} {own} {tuple(parameter.shape)}\n".encode())
        raw = whole_tensor(parameter.detach()).to(own).cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def label_of(learner: Learner) -> str:
    """Return the words for a learner's model in messages, such as "the critic's model smollm2"."""
    whose = "the model" if learner.name == POLICY else f"the {learner.name}'s model"
    return f"{whose} {learner.model.source}"
