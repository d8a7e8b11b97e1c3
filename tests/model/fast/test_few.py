"""The test of large models on a copy of their first layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from palate.config import ModelConfig
from palate.model import load_model
from palate.model.fast.few import few_disagree, first_layers
from palate.testing import tiny_model

CPU = torch.device("cpu")
MIXED = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]


@pytest.mark.parametrize(
    ("kind", "changes", "layers"),
    [
        ("llama", {"num_hidden_layers": 5}, 2),
        ("gpt2", {"n_layer": 3}, 2),
        ("gemma3_text", {"num_hidden_layers": 5, "layer_types": MIXED}, 4),
    ],
)
@pytest.mark.parametrize("lora", [True, False])
def test_the_first_layers_are_a_model_of_their_own(
    tmp_path: Path, kind: str, changes: dict[str, Any], layers: int, lora: bool
) -> None:
    directory = tiny_model(tmp_path, kind=kind, **changes)
    model = load_model(ModelConfig(model=directory, dtype="float32", device="cpu", lora=lora))
    before = {name: p.clone() for name, p in model.network.named_parameters()}
    copied = first_layers(model.network, CPU)
    assert copied is not None
    assert copied.config.num_hidden_layers == layers < model.network.config.num_hidden_layers
    names = {name for name, _ in copied.named_parameters()}
    assert names < before.keys()
    assert (copied.get_output_embeddings().weight is copied.get_input_embeddings().weight) == (
        model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    )
    assert few_disagree(model.network, model.codec, "lm", CPU) is None
    copied.get_input_embeddings().weight.data.zero_()
    assert all(torch.equal(p, before[name]) for name, p in model.network.named_parameters())


def test_a_model_that_the_fast_path_cannot_follow_is_known_by_its_first_layers(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path, kind="bloom", n_layer=3, initializer_range=0.2)
    model = load_model(ModelConfig(model=directory, dtype="float32", device="cpu", fast=False))
    assert "fast and plain log-probabilities differ" in str(
        few_disagree(model.network, model.codec, "lm", CPU)
    )


def test_layers_that_need_others_fall_back_to_the_plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str | None:
        raise RuntimeError("no layer 7")

    model = load_model(ModelConfig(model=tiny_model(tmp_path), dtype="float32", device="cpu"))
    monkeypatch.setattr("palate.model.fast.few.disagreement", fail)
    problem = few_disagree(model.network, model.codec, "lm", CPU)
    assert problem == "its first layers do not work alone (RuntimeError: no layer 7)"
