from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from palate.annotate import RewardModel, scored, scorer
from palate.errors import DataError, ModelError
from palate.model.fast.engine import FastEngine
from palate.testing import byte_tokenizer, tiny_config
from palate.types import Completion, Group, Prompt

END = 257


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random sequence classifier over bytes, saved with its tokenizer."""
    directory = tmp_path_factory.mktemp("classifier")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = tiny_config(num_labels=1, initializer_range=0.3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
    byte_tokenizer(chat=True).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def reward_model(classifier: str) -> RewardModel:
    return RewardModel.load(classifier, device="cpu", dtype="float32")


def expected(directory: str, prompt: str, completion: str, *, closed: bool) -> float:
    """Hugging Face's own forward pass on one row, without any padding."""
    tokenizer = byte_tokenizer(chat=True)
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()
    text = f"<bos>user:{prompt}<end><bos>assistant:{completion}" + "<end>" * closed
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


ROWS = [("Hi", "Hello."), ("A longer question, is it?", "No"), ("Hi", "x" * 40), ("?", "")]


def test_scores_are_the_classifiers_row_by_row(classifier: str, reward_model: RewardModel) -> None:
    # The rows differ in length, so here they share padded batches; there each goes alone.
    found = reward_model([Prompt(p) for p, _ in ROWS], [Completion(c, (1,)) for _, c in ROWS])
    alone = [expected(classifier, p, c, closed=True) for p, c in ROWS]
    assert found == pytest.approx(alone, abs=1e-5)
    assert max(alone) - min(alone) > 0.1  # there is something to tell apart


def test_the_budget_of_a_batch_changes_nothing(reward_model: RewardModel) -> None:
    rows = [Prompt(p) for p, _ in ROWS], [Completion(c, (1,)) for _, c in ROWS]
    small = RewardModel(reward_model.model, micro_batch_tokens=1)
    assert small(*rows) == pytest.approx(reward_model(*rows), abs=1e-5)


def test_every_completion_is_closed_where_a_score_was_learnt(
    classifier: str, reward_model: RewardModel
) -> None:
    prompt = Prompt("Tell me")
    cut, whole = reward_model([prompt] * 2, [Completion("Once upo", (1,), f) for f in ("length", "eos")])
    closed = expected(classifier, "Tell me", "Once upo", closed=True)
    assert [cut, whole] == pytest.approx([closed, closed], abs=1e-5)
    assert abs(closed - expected(classifier, "Tell me", "Once upo", closed=False)) > 1e-3


def test_completions_of_a_prompt_are_scored_as_if_alone(reward_model: RewardModel) -> None:
    prompts = [Prompt(p) for p in ("Hi", "Hi", "Bye", "Hi")]
    completions = [Completion(c, (1,)) for c in ("a", "bb", "", "cc")]
    alone = [reward_model([p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    assert reward_model(prompts, completions) == pytest.approx(alone, abs=1e-5)
    assert reward_model([], []) == []


@pytest.mark.parametrize("fast", [True, False])
def test_the_budget_bounds_what_is_computed_at_once(classifier: str, fast: bool) -> None:
    model = RewardModel.load(classifier, device="cpu", dtype="float32", fast=fast)
    assert isinstance(model.model.engine, FastEngine) == fast
    rows = [Prompt("Hi")] * 12, [Completion("x" * i, (1,)) for i in range(1, 13)]
    small, sizes = RewardModel(model.model, micro_batch_tokens=60), []
    forward = model.model.network.base_model.forward

    def counted(*given: Any, **named: Any) -> Any:
        sizes.append(named["input_ids"].numel())
        return forward(*given, **named)

    model.model.network.base_model.forward = counted
    assert small(*rows) == pytest.approx(model(*rows), abs=1e-5)
    whole = sizes.pop()
    assert max(sizes) <= 60 < whole
    assert len(sizes) > 1


def test_the_policys_tokens_mean_nothing_to_it(reward_model: RewardModel) -> None:
    prompts = [Prompt("Hi")] * 2
    first, second = reward_model(prompts, [Completion("yes", (7, 8, 9)), Completion("yes", (1,))])
    assert first == pytest.approx(second, abs=1e-5)  # they lie in different places of a packed row


def test_as_an_annotator(classifier: str, reward_model: RewardModel) -> None:
    group = Group(Prompt("Hi"), (Completion("a", (1,)), Completion("b", (1,))))
    loaded = scorer(f"model:{classifier}", device="cpu")
    assert loaded.name == f"model:{classifier}"
    (found,) = scored(loaded)([group])
    assert found.rewards is not None
    assert all(isinstance(reward, float) for reward in found.rewards)


def test_a_prompt_that_fills_its_context_is_named(reward_model: RewardModel) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:3: the prompt has \d+ tokens"):
        reward_model([Prompt("x" * 300, where="data.jsonl:3")], [Completion("a", (1,))])


def test_a_language_model_is_no_reward_model(tiny: str) -> None:
    # Transformers would make up a random head, and every reward would be noise.
    with pytest.raises(ModelError, match="has no reward head"):
        RewardModel.load(tiny, device="cpu")


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        RewardModel.load(str(tmp_path))
