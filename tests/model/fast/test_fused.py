"""Sampling with joined and packed weights against the network's own layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from palate.config import Sampling
from palate.learn import Policy
from palate.model.fast import fused
from palate.model.fast.attention import following
from palate.model.fast.decode import Decoder
from palate.model.fast.engine import FastEngine
from palate.model.fast.fused import Fused, can_fuse
from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, positions
from palate.model.fast.lean import states_of
from palate.model.loaded import LoadedModel
from palate.model.rows import Row
from palate.testing import tiny_model, tiny_policy

PROMPTS = ((5, 6, 7), (8,), (9, 10, 11, 12, 13), (3, 4))
VARIANTS = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    """Policies over tiny models of a kind; with LoRA, the adapters are not zero."""

    def make(name: str, **options: object) -> Policy:
        directory = tmp_path_factory.mktemp("fused")
        tiny_model(directory, kind=name.split()[0], initializer_range=0.2, **VARIANTS[name])
        policy = tiny_policy(Path(directory), **options)
        with torch.no_grad():
            for parameter_name, parameter in policy.model.trained():
                if "lora_B" in parameter_name or parameter_name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        policy.model.revision += 1
        return policy

    return make


def rows(model: LoadedModel, layers: Fused | None) -> list[Row]:
    """Rows that are filled from prompts of several lengths, so that slots are refilled."""
    groups = [[Row(prompt, np.full(8, 0.2 + 0.3 * j)) for j in range(2)] for prompt in PROMPTS]
    head = LMHead.of(model.network)
    assert head is not None
    network = FastEngine().sampling_network(model)
    options = Sampling(max_new_tokens=8)
    decoder = Decoder(network, head, model.codec, options, slots=2, rows=2, longest=5, fused=layers)
    for _ in decoder.run(iter(groups)):
        pass
    return [row for group in groups for row in group]


def fused_of(model: LoadedModel) -> Fused:
    assert can_fuse(model.network)
    return Fused(model.network)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_token_for_token_in_float32(name: str, lora: bool, policy_of: Callable[..., Policy]) -> None:
    model = policy_of(name, lora=lora, dtype="float32").model
    ours, theirs = rows(model, fused_of(model)), rows(model, None)
    assert [row.tokens for row in ours] == [row.tokens for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no packed bfloat16 here")
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("sizes", [(5, 1, 12), (1,)])
@torch.no_grad()
def test_bfloat16_up_to_its_rounding(
    sizes: tuple[int, ...], lora: bool, policy_of: Callable[..., Policy]
) -> None:
    network = policy_of("llama", lora=lora, dtype="bfloat16").model.network
    shape = [(size, ()) for size in sizes]
    ids, layout = torch.arange(3, 3 + sum(sizes))[None], PackedLayout(shape)
    with following(network):
        theirs = states_of(network)(ids, positions(shape), layout)[0].float()
    ours = Fused(network).states(ids, positions(shape), layout)[0].float()
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03


def test_weights_are_packed_again_when_they_change(policy_of: Callable[..., Policy]) -> None:
    model = policy_of("llama", lora=False, dtype="float32").model
    engine = model.engine
    assert isinstance(engine, FastEngine)
    with torch.no_grad():
        first = engine.fused(model)
        assert engine.fused(model) is first
        model.network.lm_head.weight.mul_(2.0)
        model.revision += 1
        second = engine.fused(model)
        assert first is not None
        assert second is not None
        hidden = torch.ones(1, model.network.config.hidden_size)
        torch.testing.assert_close(second.logits(hidden), 2 * first.logits(hidden))


@torch.no_grad()
def test_with_the_adapter_off_the_base_is_sampled(policy_of: Callable[..., Policy]) -> None:
    model = policy_of("llama", lora=True, dtype="float32").model
    with model.without_adapter():
        off, expected = rows(model, fused_of(model)), rows(model, None)
    assert [row.tokens for row in off] == [row.tokens for row in expected]
    assert [row.tokens for row in off] != [row.tokens for row in rows(model, fused_of(model))]


def test_a_pass_with_gradient_frees_the_copy(policy_of: Callable[..., Policy]) -> None:
    model = policy_of("llama", lora=False, dtype="float32").model
    engine = model.engine
    assert isinstance(engine, FastEngine)
    first = engine.fused(model)
    with torch.no_grad(), engine.computing(model):
        assert engine.fused(model) is first
    with engine.computing(model):
        assert engine.fused(model) is not first


def test_a_large_model_samples_with_its_own_weights(
    policy_of: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = policy_of("llama", lora=False, dtype="float32").model.network
    assert can_fuse(network)
    monkeypatch.setattr(fused, "MOST_BYTES", 1000)
    assert not can_fuse(network)
