from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import palate
from palate.config import LearnerConfig, ModelConfig
from palate.errors import ModelError
from palate.learn import Policy
from palate.model import load_model
from palate.testing import tiny_config, tiny_model
from palate.types import Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

PROMPTS = [Prompt("hello"), Prompt("why?")]


def loaded(name: str, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(name, **{"dtype": torch.float32, **options})


def config(model: Any, **changes: Any) -> LearnerConfig:
    return LearnerConfig.model_validate({"model": model, "lr": 1e-2, **changes})


def facts(network: Any) -> list[Any]:
    """All that a caller could see of a model."""
    weights = [(n, p.detach().clone(), p.requires_grad) for n, p in network.named_parameters()]
    modules = [(n, type(m), m.training) for n, m in network.named_modules()]
    return [weights, modules, network.config.to_dict(), network.name_or_path]


def same(one: list[Any], other: list[Any]) -> bool:
    weights = zip(one[0], other[0], strict=True)
    return one[1:] == other[1:] and all(a[::2] == b[::2] and a[1].equal(b[1]) for a, b in weights)


def texts(policy: Policy) -> list[str]:
    sampling = palate.OAIFConfig(data="x", max_new_tokens=6).sampling
    return [g.completions[0].text for g in policy.snapshot().sample(PROMPTS, 1, sampling, seed=0)]


def learn(policy: Policy) -> None:
    codec = policy.model.codec
    example = palate.Example(PROMPTS[0], codec.completion(PROMPTS[0], "yes"))
    policy.update([example], palate.Likelihood.per_token([example]))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_loaded_model_learns_as_its_name_and_stays_as_it_is(lora: bool, kind: str, tmp_path: Path) -> None:
    name = tiny_model(tmp_path / kind, kind=kind, chat=True)
    network = loaded(name).train()
    before = facts(network)
    policies = [
        Policy.load(config(model, lora=lora, device="cpu", dtype="float32"), total_steps=2)
        for model in ((network, AutoTokenizer.from_pretrained(name)), network, name)
    ]
    for policy in policies:
        learn(policy)
    assert texts(policies[0]) == texts(policies[1]) == texts(policies[2])
    pairs = zip(policies[0].model.trained(), policies[2].model.trained(), strict=True)
    assert all(mine.equal(theirs) for (_, mine), (_, theirs) in pairs)
    assert same(facts(network), before)
    # With LoRA the frozen weights take no memory of their own.
    own = {p.data_ptr() for p in network.parameters()}
    shared = [p for p in policies[0].model.network.parameters() if p.data_ptr() in own]
    assert len(shared) == (len(own) if lora else 0)


@pytest.mark.parametrize("lora", [True, False])
def test_a_checkpoint_loads_elsewhere(
    lora: bool, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(tiny).parent)  # the model has a relative name
    policy = Policy.load(config(loaded(Path(tiny).name), lora=lora), total_steps=2)
    learn(policy)
    policy.save(tmp_path / "saved")
    monkeypatch.chdir(tmp_path)
    again = Policy.load(config(str(tmp_path / "saved"), dtype="float32"), total_steps=1)
    assert texts(again) == texts(policy)


def changed(name: str) -> Any:
    network = loaded(name)
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    return network


def made(name: str) -> Any:
    return AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [(changed, "its weight model.embed_tokens.weight is not that of"), (made, "it has no name_or_path")],
)
def test_a_changed_model_takes_no_adapter(make: Any, message: str, tiny: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    network = make(tiny)
    with pytest.raises(ModelError, match=f"cannot carry an adapter, since {message}.*give lora=False"):
        Policy.load(config((network, tokenizer)), total_steps=1)
    policy = Policy.load(config((network, tokenizer), lora=False), total_steps=1)
    policy.save(tmp_path / "whole")
    again = Policy.load(config(str(tmp_path / "whole"), dtype="float32", lora=False), total_steps=1)
    assert texts(again) == texts(policy)


def test_a_model_without_a_name_needs_a_tokenizer(tiny: str) -> None:
    with pytest.raises(ModelError, match=r"LlamaForCausalLM given in Python has no name.* give tokenizer="):
        load_model(ModelConfig.model_validate({"model": made(tiny), "lora": False}))


def test_its_device_and_format_are_kept(tiny: str) -> None:
    half = load_model(ModelConfig.model_validate({"model": loaded(tiny, dtype=torch.bfloat16)}))
    assert half.dtype == torch.bfloat16
    for wrong, message in (
        ({"model": loaded(tiny, dtype=torch.float16)}, "is in float16, expected float32 or bfloat16"),
        ({"model": loaded(tiny), "dtype": "bfloat16"}, "dtype is bfloat16 and model .* is in float32"),
        ({"model": loaded(tiny), "device": "meta"}, "device is meta and model .* is on cpu"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(ModelConfig.model_validate(wrong))


def test_a_model_of_the_wrong_kind(tiny: str) -> None:
    policy = Policy.load(config(tiny), total_steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, dtype=torch.float32)
    for model, head, message in (
        (policy.model.peft, "lm", "has an adapter already"),
        (classifier, "lm", "LlamaForSequenceClassification, which cannot generate text"),
        (loaded(tiny), "scalar", "LlamaForCausalLM, expected a causal model with one output"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(ModelConfig.model_validate({"model": (model, tokenizer)}), head=head)  # type: ignore[arg-type]
    model = load_model(ModelConfig.model_validate({"model": classifier}), head="scalar")
    assert "score" in "".join(name for name, _ in model.trained())


def test_dropout_is_off_and_saved(tmp_path: Path) -> None:
    name = tiny_model(tmp_path / "dropping", kind="gpt2", attn_pdrop=0.3, resid_pdrop=0.2)
    network = loaded(name)
    model = load_model(ModelConfig.model_validate({"model": network, "lora": False}))
    assert network.config.resid_pdrop == 0.2
    assert model.network.config.resid_pdrop == 0.0
    assert {m.p for m in model.network.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    model.save(tmp_path / "saved")
    assert loaded(str(tmp_path / "saved")).config.resid_pdrop == 0.2
