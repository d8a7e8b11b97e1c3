from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import palate
from palate.annotate import annotator
from palate.calibration import annotator_quality
from palate.errors import ModelError
from palate.learn import Policy
from palate.methods.reward_model import RewardModelConfig, ranking_example
from palate.types import Comparison, Completion, Group, Pair, Prompt

Trained = Callable[..., palate.Outcome]
KINDS = pytest.mark.parametrize("kind", ["pointwise", "ranker"])
LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


def rows(count: int, seed: int, **columns: Any) -> list[dict[str, Any]]:
    """Pairs in which capitals are the better answer, at any length."""
    draw = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(4, 16)))

    return [
        {"prompt": f"{seed}.{i}?", "chosen": word("ABCDEFGHIJKLM"), "rejected": word("nopqrstuvwxyz")}
        | columns
        for i in range(count)
    ]


def write(path: Path, found: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture
def trained(base: str, tmp_path: Path) -> Trained:
    """A whole run on such pairs."""

    def go(
        *, learnt: list[dict[str, Any]] | None = None, display: Any = None, **options: Any
    ) -> palate.Outcome:
        kind = options.get("kind", "pointwise")
        fixed = {
            "model": base,
            "data": write(tmp_path / "train.jsonl", rows(192, 1) if learnt is None else learnt),
            "eval_data": write(tmp_path / "test.jsonl", rows(40, 2)),
            "output": tmp_path / f"run{len(list(tmp_path.iterdir()))}",
            "steps": 8 if kind == "pointwise" else 16,
            "batch_size": 16,
            "lora": False,
            "lr": 1e-2 if options.get("lora") else 3e-3,
            "dtype": "float32",
            "device": "cpu",
        }
        return palate.train(
            "reward-model", RewardModelConfig.model_validate(fixed | options), display=display
        )

    return go


def log(outcome: palate.Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outcome.run.directory / "metrics.jsonl").read_text().splitlines()]


def checkpoint(outcome: palate.Outcome) -> str:
    return str(outcome.run.directory / outcome.summary["checkpoint"])


# ---- It learns -------------------------------------------------------------------------------------


def swapped(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same pairs, with the worse answer labelled as the better one."""
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in found]


@KINDS
@pytest.mark.parametrize("label", [list, swapped], ids=["labels", "swapped labels"])
def test_held_out_pairs_come_to_be_ranked(
    trained: Trained, tmp_path: Path, kind: str, label: Callable[..., list[dict[str, Any]]]
) -> None:
    # A random model may tell capitals from small letters by chance, and so rank all pairs rightly or all
    # wrongly. But from the same start it cannot do both: it has learnt the labels.
    held_out = write(tmp_path / "labelled.jsonl", label(rows(40, 2)))
    outcome = trained(kind=kind, learnt=label(rows(192, 1)), eval_data=held_out)
    summary = outcome.summary
    assert summary["accuracy_after"] >= 0.8  # by chance, 40 pairs go beyond 0.75 once in a thousand
    assert summary["accuracy_low"] < summary["accuracy_after"] <= summary["accuracy_high"]
    assert summary["accuracy_shorter_after"] >= 0.8  # length is no help here
    assert summary["longer_wins"] < 0.75
    assert 0 <= summary["ece_after"] <= 1
    assert (summary["held_out_pairs"], summary["pairs"]) == (40, 192)
    measured = [row for row in log(outcome) if "eval_accuracy" in row]
    assert [row["step"] for row in measured] == [0, summary["steps"]]
    assert measured[1]["eval_loss"] < measured[0]["eval_loss"]
    assert measured[1]["eval_margin"] > measured[0]["eval_margin"]
    assert measured[1]["eval_ece"] == summary["ece_after"]
    assert outcome.evaluation is None
    on_disk = json.loads((outcome.run.directory / "summary.json").read_text())
    assert on_disk == summary


@KINDS
def test_an_adapter_learns_it_too(trained: Trained, kind: str) -> None:
    assert trained(kind=kind, lora=True).summary["accuracy_after"] >= 0.8


def test_metrics_have_the_names_of_trls_reward_trainer(trained: Trained) -> None:
    found = [row for row in log(trained(steps=2)) if "loss" in row]
    names = {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "grad_norm", "epoch"}
    assert all(row.keys() >= names for row in found)
    measured = [row for row in log(trained(steps=2)) if "eval_ece" in row]
    assert all(row.keys() >= {f"eval_{name}" for name in names - {"grad_norm", "epoch"}} for row in measured)


def test_a_ranker_logs_how_likely_the_label_is(trained: Trained) -> None:
    # In the whole vocabulary: a model that knows nothing of labels begins far below one half.
    first, *_, last = [row for row in log(trained(kind="ranker")) if "loss" in row]
    assert first["loss"] > 2
    assert last["loss"] < first["loss"] - 1
    assert last["logps/completion"] == pytest.approx(-last["loss"], abs=1e-6)


def test_measured_in_between(trained: Trained) -> None:
    outcome = trained(steps=4, eval_every=2)
    assert [row["step"] for row in log(outcome) if "eval_ece" in row] == [0, 2, 4]


@KINDS
def test_without_held_out_pairs_nothing_is_measured(trained: Trained, kind: str) -> None:
    outcome = trained(kind=kind, steps=1, eval_data=None)
    assert not [name for row in log(outcome) for name in row if name.startswith("eval_")]
    assert not [name for name in outcome.summary if "accuracy" in name]


def test_a_margin_asks_for_a_wider_difference(trained: Trained) -> None:
    wide = rows(192, 1, margin=4.0)
    free, asked_for = (
        trained(learnt=wide, margin_scale=scale, steps=6).run.measured[-1]["eval_margin"]
        for scale in (0.0, 2.0)
    )
    assert asked_for > free + 1


def test_centred_rewards_stay_around_0(trained: Trained) -> None:
    free, centred = (
        trained(center_rewards_coefficient=weight, steps=12).run.measured[-1] for weight in (0.0, 0.1)
    )
    assert abs(centred["eval_mean_reward"]) < 0.25 < abs(free["eval_mean_reward"])
    assert centred["eval_accuracy"] >= 0.8


# ---- What is saved ---------------------------------------------------------------------------------

TEXTS = [("1?", "ABC"), ("what is it?", "xyzxyzxyz"), ("1?", "MMMMMMMMMMMMMM")]


def scores_of(directory: str) -> list[float | None]:
    """What `--reward model:DIR` says, in float32."""
    from palate.annotate import RewardModel

    loaded = RewardModel.load(directory, device="cpu", dtype="float32")
    return loaded([Prompt(p) for p, _ in TEXTS], [Completion(c, (1,)) for _, c in TEXTS])


@LORA
def test_the_checkpoint_is_a_classifier_for_everybody(trained: Trained, base: str, lora: bool) -> None:
    directory = checkpoint(trained(lora=lora, steps=3))
    if lora:
        start = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(start, directory)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
        assert model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = []
    with torch.no_grad():
        for prompt, completion in TEXTS:
            ids = tokenizer(prompt + completion + tokenizer.eos_token, return_tensors="pt")["input_ids"]
            found.append(float(model.eval()(input_ids=ids).logits[0, 0]))
    assert scores_of(directory) == pytest.approx(found, abs=1e-5)
    assert max(found) - min(found) > 0.1


@LORA
@KINDS
def test_the_checkpoint_is_a_reward(trained: Trained, kind: str, lora: bool) -> None:
    outcome = trained(kind=kind, lora=lora)
    spec = "model" if kind == "pointwise" else "ranker"
    better, worse = Completion("GABLE", (1,)), Completion("sunny", (2,))
    for where in (checkpoint(outcome), str(outcome.run.directory)):  # a run stands for its last one
        annotate = annotator([f"{spec}:{where}"], device="cpu", dtype="float32")
        (found,) = annotate([Group(Prompt("9?"), (worse, better))])
        assert found.rewards is not None
        assert found.rewards[1] > found.rewards[0]  # type: ignore[operator]


def test_a_saved_ranker_ranks_as_it_did(trained: Trained) -> None:
    outcome = trained(kind="ranker")
    codec = outcome.policy.model.codec
    pairs = [
        codec.pair(Comparison(Prompt(row["prompt"]), row["chosen"], row["rejected"])) for row in rows(40, 2)
    ]
    annotate = annotator([f"ranker:{checkpoint(outcome)}"], device="cpu", dtype="float32")
    found = annotator_quality(annotate, pairs)
    assert found.accuracy == outcome.summary["accuracy_after"]
    assert found.ece == pytest.approx(outcome.summary["ece_after"], abs=1e-4)


def test_a_ranker_is_a_language_model_and_no_classifier(trained: Trained) -> None:
    directory = checkpoint(trained(kind="ranker", steps=1))
    with pytest.raises(ModelError, match="has no reward head"):
        scores_of(directory)


def test_training_goes_on_from_a_checkpoint(trained: Trained) -> None:
    first = trained(steps=4)
    second = trained(steps=1, model=checkpoint(first))
    assert second.summary["accuracy_before"] == first.summary["accuracy_after"]
    assert second.summary["ece_before"] == pytest.approx(first.summary["ece_after"], abs=1e-6)


# ---- Order, randomness, resuming -------------------------------------------------------------------


def test_the_label_follows_the_order(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    pair = policy.model.codec.pair(Comparison(Prompt("Q"), "yes", "nope"))
    for chosen_first, label in ((True, "A"), (False, "B")):
        example = ranking_example(policy, pair, chosen_first)
        text = example.prompt.text
        assert (text.index("yes") < text.index("nope")) == chosen_first
        assert example.completion.text == label
        assert policy.model.codec.text(example.completion.token_ids) == label


def test_both_orders_are_learnt_from(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def noted(policy: Policy, pair: Pair, chosen_first: bool) -> Any:
        example = ranking_example(policy, pair, chosen_first)
        found.append(example.completion.text)
        return example

    monkeypatch.setattr("palate.methods.reward_model.ranking_example", noted)
    for seed in (0, 0, 1):
        trained(kind="ranker", steps=1, seed=seed, eval_data=None)
    one, again, other = found[:192], found[192:384], found[384:]
    assert one == again != other  # the seed decides
    assert 70 <= one.count("A") <= 122  # 96 ± 7: outside once in 5,000


class Unplugged(palate.Display):
    """Pulls the plug when a step has been logged so many times."""

    def __init__(self, count: int) -> None:
        super().__init__(quiet=True)
        self.count = count

    def metrics(self, row: Any, samples: Any) -> None:
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt
        super().metrics(row, samples)


@LORA
def test_a_ranker_that_was_cut_off_ends_in_the_same_weights(
    trained: Trained, tmp_path: Path, lora: bool
) -> None:
    given: dict[str, Any] = {
        "kind": "ranker",
        "lora": lora,
        "steps": 4,
        "checkpoint_every": 1,
        "eval_every": 2,
    }
    whole = trained(**given)
    for count in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            trained(**given, output=tmp_path / "cut", display=Unplugged(count))
    resumed = trained(**given, output=tmp_path / "cut")
    one, other = (o.learner.model.network.state_dict() for o in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.run.measured == resumed.run.measured
    assert {k: v for k, v in whole.summary.items() if k != "seconds"} == {
        k: v for k, v in resumed.summary.items() if k != "seconds"
    }


# ---- What a user gets wrong ------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["margin_scale", "center_rewards_coefficient"])
def test_a_ranker_has_no_rewards(option: str) -> None:
    with pytest.raises(ValidationError, match=rf"{option} is 0\.5, but a ranker has no rewards"):
        RewardModelConfig(data="x", kind="ranker", **{option: 0.5})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"kind": "pairwise"}, {"margin_scale": -1}, {"center_rewards_coefficient": -1}, {"epochs": 0}]
)
def test_options_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RewardModelConfig(data="x", **wrong)


def test_a_question_without_room_is_told_before_training(trained: Trained) -> None:
    with pytest.raises(palate.DataError, match=r"train\.jsonl:1: the prompt has \d+ tokens"):
        trained(kind="ranker", learnt=[{"prompt": "x" * 200, "chosen": "a", "rejected": "b"}])
