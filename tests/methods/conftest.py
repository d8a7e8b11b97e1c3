"""A base model that can be taught in seconds, and the rows and weights that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.learn import Policy
from palate.run import Run
from palate.testing import tiny_model

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with wide random weights: one of the usual narrow ones gives nearly uniform tokens, which
    an adapter on the layers alone can hardly change.
    """
    return tiny_model(tmp_path_factory.mktemp("base"), initializer_range=0.2)


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in Path(run.directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(policy: Policy) -> Weights:
    """A copy of every weight, an adapter's too."""
    return {name: tensor.detach().clone() for name, tensor in policy.model.network.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    """Whether all weights are bitwise the same."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def rows() -> Any:
    return rows_of


@pytest.fixture
def weights() -> Any:
    return weights_of


@pytest.fixture
def equal() -> Any:
    return same
