"""The value head: one number before each token of a completion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from palate.config import ModelConfig
from palate.model import LoadedModel, TokenValues, load_model
from palate.model.fast.engine import FastEngine
from palate.model.plain.engine import PlainEngine
from palate.testing import tiny_model
from palate.types import Completion, Group, Prompt


def critic(directory: str, **options: object) -> LoadedModel:
    cfg = {"model": directory, "dtype": "float32", "device": "cpu", "lora": False} | options
    model = load_model(ModelConfig.model_validate(cfg), head="value")
    with torch.no_grad():
        model.network.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    return model


def groups(model: LoadedModel) -> list[Group]:
    texts = [("a", "bcd"), ("efghijk",), ("lm", "nopqr", "s")]
    prompts = [Prompt("hi"), Prompt("a longer question"), Prompt("so")]
    return [
        Group(prompt, tuple(model.codec.completion(prompt, text) for text in own))
        for prompt, own in zip(prompts, texts, strict=True)
    ]


def values_of(model: LoadedModel, records: list[Group]) -> TokenValues:
    with model.computing():
        values = model.values(records).values
    assert values is not None
    return values


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "gpt_neox", "phi", "bloom"])
def test_values_are_those_of_the_states_before_the_tokens(kind: str, tmp_path: Path) -> None:
    model = critic(tiny_model(tmp_path, kind=kind, chat=True))
    records = groups(model)
    wanted = []
    for record in records:
        prompt = model.codec.prompt_ids(record.prompt)
        for completion in record.completions:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                hidden = model.network.base_model(ids).last_hidden_state[0]
                wanted.append(model.network.score(hidden)[len(prompt) - 1 : -1, 0])
    for engine in (PlainEngine(), *([FastEngine()] if isinstance(model.engine, FastEngine) else [])):
        for row, expected in zip(
            values_of(replace(model, engine=engine), records).rows(), wanted, strict=True
        ):
            torch.testing.assert_close(row.detach(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("engine", [PlainEngine(), FastEngine()])
def test_the_value_before_a_token_does_not_know_it(tiny: str, engine: PlainEngine) -> None:
    model = replace(critic(tiny), engine=engine)
    prompt = Prompt("hi")
    one, other = (
        values_of(model, [Group(prompt, (Completion("", (first, 70, 257)),))]).values[0] for first in (65, 66)
    )
    assert one[0] == other[0]
    assert one[1] != other[1]


def test_gradients_are_those_of_the_padded_way(tiny: str) -> None:
    model = critic(tiny)
    gradients = []
    for engine in (FastEngine(), PlainEngine()):
        way = replace(model, engine=engine)
        model.network.zero_grad()
        with way.computing():
            values = way.values(groups(model)).values
            assert values is not None
            (values.values.square() * torch.arange(1, values.values.shape[1] + 1)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in model.trained() if p.grad is not None]))
    # The gradients reach 2e4, and small ones are differences of large ones: errors are of the largest.
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lora", [True, False])
def test_a_language_models_value_head_is_zero(tiny: str, lora: bool) -> None:
    cfg = ModelConfig.model_validate({"model": tiny, "dtype": "float32", "device": "cpu", "lora": lora})
    model = load_model(cfg, head="value")
    assert values_of(model, groups(model)).values.abs().max() == 0
    assert any("score" in name for name, _ in model.trained())


@pytest.mark.parametrize("lora", [True, False])
def test_a_reward_models_head_is_kept(tiny: str, tmp_path: Path, lora: bool) -> None:
    cfg = ModelConfig.model_validate({"model": tiny, "dtype": "float32", "device": "cpu", "lora": lora})
    reward = load_model(cfg, head="scalar")
    reward.save(tmp_path)
    again = ModelConfig.model_validate({**cfg.model_dump(), "model": str(tmp_path)})
    model = load_model(again, head="value")
    record = groups(model)[:1]
    # The score is read at the last token; the value there is that of a token that would follow.
    longer = [
        Group(r.prompt, tuple(replace(c, token_ids=(*c.token_ids, 65)) for c in r.completions))
        for r in record
    ]
    scores = reward.scores(record).scores
    assert scores is not None
    last = torch.stack([row[-1] for row in values_of(model, longer).rows()])
    torch.testing.assert_close(last, scores, atol=1e-5, rtol=0)
