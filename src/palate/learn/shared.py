"""A learner's state in several processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from palate.learn.learner import Learner
from palate.world import current


def share_state(learner: Learner) -> None:
    """Give the learner of every process the weights, moments and numbers of that of process 0.

    Tensors travel weight by weight, so that a process has room for two copies of one weight, not of all.
    """
    world = current()
    own = learner.optimizer.state() if world.leads else {}

    def facts() -> list[Any]:
        shapes = [
            [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in own.items()
        ]
        return [shapes, learner.numbers()]

    shapes, numbers = world.lead("state of a learner", facts)
    by_weight: dict[str, dict[str, Any]] = {}
    for key, shape, dtype in shapes:
        kind, name = key.split("/", 1)
        by_weight.setdefault(name, {})[kind] = shape, getattr(torch, dtype)
    with nullcontext() if world.leads else learner.restoring(numbers["version"], numbers["updates"]):
        for name, kinds in by_weight.items():
            if world.leads:
                tensors = {kind: own[f"{kind}/{name}"] for kind in kinds}
            else:
                tensors = {
                    kind: torch.empty(shape, dtype=dtype, device=learner.model.device)
                    for kind, (shape, dtype) in kinds.items()
                }
            world.broadcast("state of a learner", list(tensors.values()))
            if not world.leads:
                learner.optimizer.restore_weight(name, tensors)
    if not world.leads:
        learner.skipped, learner.skipped_in_a_row = numbers["skipped"], numbers["skipped_in_a_row"]
