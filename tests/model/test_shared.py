from __future__ import annotations

from pathlib import Path

import pytest
import torch

from palate.config import LearnerConfig, ModelConfig
from palate.model import load_model, share_frozen, weight_bytes
from palate.model.loaded import Head, LoadedModel
from palate.testing import tiny_model
from palate.types import Example, Prompt


def load(directory: str, head: Head = "lm", **options: object) -> LoadedModel:
    cfg = {"model": directory, "dtype": "float32", "device": "cpu", "lora_rank": 2} | options
    return load_model(ModelConfig.model_validate(cfg), head=head)


def records(model: LoadedModel) -> list[Example]:
    prompts = [Prompt(f"question {i}" * (i + 1)) for i in range(3)]
    return [Example(p, model.codec.completion(p, "yes" * (i + 1))) for i, p in enumerate(prompts)]


def test_adapters_share_their_base(tiny: str) -> None:
    policy, critic = load(tiny), load(tiny, "value")
    apart = weight_bytes(policy, critic)
    before = critic.values(records(critic)).values
    saved = share_frozen(critic, policy)
    trained = sum(p.numel() * 4 for model in (policy, critic) for _, p in model.trained())
    base = sum(p.numel() * 4 for p in policy.network.parameters() if not p.requires_grad)
    assert weight_bytes(policy, critic) == apart - saved
    # What is left: one base, two adapters, and the head with the copy that peft keeps of it.
    assert weight_bytes(policy, critic) == base + trained + 32 * 4
    after = critic.values(records(critic)).values
    assert before is not None
    assert after is not None
    assert torch.equal(before.values, after.values)


def test_learning_by_one_adapter_does_not_change_the_other(tiny: str) -> None:
    policy, critic = load(tiny), load(tiny, "value")
    share_frozen(critic, policy)
    logps = policy.outputs(records(policy)).logps
    assert logps is not None
    for _, parameter in critic.trained():
        parameter.data.add_(1.0)
    again = policy.outputs(records(policy)).logps
    assert again is not None
    assert torch.equal(logps.values, again.values)
    assert not {id(p) for _, p in policy.trained()} & {id(p) for _, p in critic.trained()}


def test_what_is_trained_or_other_is_not_shared(tiny: str, tmp_path: Path) -> None:
    assert share_frozen(load(tiny, "value", lora=False), load(tiny, lora=False)) == 0
    assert share_frozen(load(tiny, "value"), load(tiny, lora=False)) == 0
    other = tiny_model(tmp_path, chat=True, seed=1)
    model = load(other, "value")
    saved = share_frozen(model, load(tiny))
    equal = sum(p.numel() * 4 for n, p in model.network.named_parameters() if "norm" in n)
    assert saved == equal  # norms begin as ones in every model


@pytest.mark.parametrize("fast", [True, False])
def test_a_shared_model_is_saved_whole(tiny: str, tmp_path: Path, fast: bool) -> None:
    policy, critic = load(tiny), load(tiny, "value", fast=fast)
    share_frozen(critic, policy)
    for _, parameter in critic.trained():
        parameter.data.add_(0.1)
    expected = critic.values(records(critic)).values
    critic.save(tmp_path)
    cfg = LearnerConfig.model_validate({"model": str(tmp_path), "dtype": "float32", "device": "cpu"})
    again = load_model(cfg, head="value")
    found = again.values(records(again)).values
    assert expected is not None
    assert found is not None
    torch.testing.assert_close(found.values, expected.values, atol=1e-6, rtol=0)
