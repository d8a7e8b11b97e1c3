from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from palate.annotate import Ranker
from palate.errors import ConfigError, RunError
from palate.evaluation import EvaluateConfig, evaluate
from palate.report.evaluated import notes, table, write_evaluation
from palate.settings import load_config
from palate.testing import FaultyServer, judge_reply, tiny_model

TINY = {"dtype": "float32", "device": "cpu", "max_new_tokens": 6, "limit": 6, "reward": "length:3"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three random models with different weights."""
    return [
        tiny_model(tmp_path_factory.mktemp(f"m{seed}"), chat=True, seed=seed, initializer_range=0.3)
        for seed in (1, 2, 3)
    ]


def config(**settings: Any) -> EvaluateConfig:
    return load_config(EvaluateConfig, file=None, flags={**TINY, **settings}, python=True)


def test_two_models_against_a_third(models: list[str], tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("My own words.\n\nAnd more of them" + ", and more" * 40)
    done = evaluate(config(model=models[:2], against=models[2], output=tmp_path / "e", text=str(text)))
    assert json.loads((tmp_path / "e" / "summary.json").read_text()) == done.result
    first = done.result["models"][0]
    assert first["wins"] + first["ties"] + first["losses"] == done.result["prompts"] == 6
    assert first["win_rate"] == pytest.approx((first["wins"] + first["ties"] / 2) / 6)
    assert first["win_rate_low"] <= first["win_rate"] <= first["win_rate_high"]
    assert 0 < first["length_controlled_win_rate"] < 1
    assert first["kl_standard_error"] > 0
    assert first["perplexity"] > 1
    assert first["text_truncated"] == 1  # a text that nobody counts would be measured in part
    assert any("1 of your texts are longer" in note for note in notes(done.result))
    best = {row["name"]: row["best"] for row in done.result["best_of"]}
    assert best.keys() == set(models)
    assert sum(best.values()) == pytest.approx(1)
    assert len(done.samples) == 6
    assert [output["name"] for output in done.samples[0]["outputs"]] == [models[2], *models[:2]]


def test_a_second_call_resumes_and_samples_nothing(models: list[str], tmp_path: Path) -> None:
    cfg = config(model=models[0], against=models[1], output=tmp_path / "e")
    first = evaluate(cfg)
    (tmp_path / "e" / "summary.json").unlink()  # interrupted before the end
    again = evaluate(cfg)
    drop = {"seconds"}
    assert {k: v for k, v in again.result.items() if k not in drop} == {
        k: v for k, v in first.result.items() if k not in drop
    }
    assert again.samples == first.samples


def test_a_model_against_itself_under_another_name_ties_on_average(models: list[str], tmp_path: Path) -> None:
    other = tmp_path / "copy"
    other.symlink_to(models[0])
    done = evaluate(config(model=models[0], against=str(other), output=tmp_path / "e"))
    (numbers,) = done.result["models"]
    assert numbers["kl"] == pytest.approx(0, abs=1e-4)
    texts = [[o["text"] for o in row["outputs"]] for row in done.samples]
    assert any(a != b for a, b in texts), "the two sides draw independently"


def test_answers_in_the_data_are_a_baseline(models: list[str], tmp_path: Path) -> None:
    data = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Question {i}?", "completion": "one two three"} for i in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = evaluate(
        config(model=models[0], against="data", data=str(data), split="train", output=tmp_path / "e")
    )
    assert done.result["baseline"]["reward"] == pytest.approx(0)  # three words, as wanted
    assert done.result["models"][0]["win_rate"] <= 0.5
    assert "kl" not in done.result["models"][0]


def test_changed_weights_are_refused(models: list[str], tmp_path: Path) -> None:
    here = tmp_path / "model"
    here.symlink_to(models[0])
    cfg = config(model=str(here), against=models[2], output=tmp_path / "e")
    evaluate(cfg)
    here.unlink()
    here.symlink_to(models[1])
    with pytest.raises(RunError, match="the model"):
        evaluate(cfg)


def test_the_page_has_every_number_and_no_script(models: list[str], tmp_path: Path) -> None:
    done = evaluate(config(model=models[:2], against=models[2], output=tmp_path / "e"))
    done.samples[0]["outputs"][0]["text"] = "<script>alert(1)</script>"
    page = write_evaluation(done.result, done.samples, tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    _, rows = table(done.result)
    assert {row[0] for row in rows} >= {"win rate", "win rate at equal length", "KL", "chosen best"}
    for row in rows:
        assert row[0] in page


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "a"}, "nothing to compare it with"),
        ({"model": ["a", "b"], "against": "a"}, "given twice"),
        ({"model": ["a", "b"], "reward": ()}, "no reward is given"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**settings)


def test_the_default_place_depends_on_the_settings() -> None:
    one, other = config(model=["a", "b"]), config(model=["a", "b"], seed=1)
    assert one.place == config(model=["a", "b"]).place != other.place
    assert one.place.parent == Path("runs")


def test_a_judge_is_asked_in_both_orders_and_paid_once(
    models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with FaultyServer(
        lambda body, _: judge_reply(body, lambda one, other: 0.5 + 0.4 * (one > other))
    ) as server:
        judge = f"server:m@{server.url}"
        cfg = config(
            model=models[:2], against=models[2], judge=judge, reward=(), output=tmp_path / "e", kl=False
        )
        first = evaluate(cfg)
        asked = len(server.requests)
        again = evaluate(cfg)
        assert len(server.requests) == asked
    assert first.result["models"] == again.result["models"]
    model = first.result["models"][0]
    assert "reward" not in model, "a pairwise judge's mean is the win rate"
    assert model["wins"] + model["ties"] + model["losses"] == 6
    assert first.result["judge_verdicts"] >= 2 * 2 * 6  # two models, both orders
    assert sum(row["best"] for row in first.result["best_of"]) == pytest.approx(1)


def test_a_policy_cannot_judge_itself_here() -> None:
    with pytest.raises(ConfigError, match="judge is self"):
        config(model=["a", "b"], judge="self", reward=())


class Coin:
    """A judge without a preference."""

    name = "coin"

    def __call__(self, prompts: Any, pairs: Any) -> list[float | None]:
        return [0.5] * len(pairs)


def named_ranker() -> Ranker:
    ranker = object.__new__(Ranker)  # without a model
    ranker.name = "r"
    return ranker


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"reward": ("length:5",)}, "score"),
        ({"reward": ("ranker:r",)}, "log-odds"),
        ({"reward": [Coin()]}, "probability"),
        ({"reward": [named_ranker()]}, "log-odds"),
        ({"reward": (), "judge": "local:m"}, "probability"),
        ({"reward": (), "judge": "local:m", "judge_mode": "rubric"}, "score"),
    ],
)
def test_the_scale_of_the_rewards(settings: dict[str, Any], scale: str) -> None:
    assert config(model=["a", "b"], **settings).scale == scale


def test_only_a_judge_that_compares_is_asked_in_both_orders() -> None:
    result = {"prompts": 1, "annotator": "a", "models": [{}], "pairwise": True}
    assert notes(result) == ["1 held-out prompt; the annotator is a, which is asked in both orders."]
    assert notes({**result, "prompts": 2, "pairwise": False}) == ["2 held-out prompts; the annotator is a."]
