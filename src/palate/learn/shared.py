"""A learner's state in several processes."""

from __future__ import annotations

from typing import Any

import torch

from palate.learn.learner import Learner
from palate.world import current


def share_state(learner: Learner) -> None:
    """Give the learner of every process the weights, moments and numbers of that of process 0."""
    world = current()
    own = learner.optimizer.state() if world.leads else {}

    def facts() -> list[Any]:
        shapes = [
            [name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in own.items()
        ]
        return [shapes, learner.numbers()]

    shapes, numbers = world.lead("state of a learner", facts)
    if not world.leads:
        own = {
            name: torch.empty(shape, dtype=getattr(torch, dtype), device=learner.model.device)
            for name, shape, dtype in shapes
        }
    world.broadcast("state of a learner", list(own.values()))
    if not world.leads:
        learner.restore(own, version=numbers["version"], updates=numbers["updates"])
        learner.skipped, learner.skipped_in_a_row = numbers["skipped"], numbers["skipped_in_a_row"]
