"""`palate.train` as a notebook calls it: settings by name, and Python objects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import palate
from palate.errors import AnnotatorError, RunError
from palate.testing import ScriptedJudge, ScriptedScorer

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ROWS = [{"prompt": f"q{i}", "n": i} for i in range(6)]

Train = Callable[..., palate.Outcome]


def long(completions: list[str], **_: object) -> list[float]:
    return [float(len(str(text))) for text in completions]


def weighted(by: float) -> Callable[..., list[float]]:
    def reward(completions: list[str], n: list[int], **_: object) -> list[float]:
        return [by * len(str(text)) + k for text, k in zip(completions, n, strict=True)]

    return reward


@pytest.fixture
def train(tiny: str, tmp_path: Path) -> Train:
    """A short run in one directory, always the same unless it is changed."""

    def make(**changes: Any) -> palate.Outcome:
        fixed = {"model": tiny, "device": "cpu", "dtype": "float32", "steps": 1, "batch_size": 2, "n": 3}
        more = {"max_new_tokens": 5, "data": ROWS[:4], "eval_data": ROWS[4:], "reward": long}
        place = {"output": tmp_path / "run", "display": None}
        return palate.train("oaif", **{**fixed, **more, **place, **changes})

    return make


def config_of(result: palate.Outcome) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.directory / "config.json").read_text())["config"]
    return found


def test_the_result(train: Train, tmp_path: Path) -> None:
    result = train()
    assert result.summary["steps"] == 1
    assert result.directory == tmp_path / "run"
    assert (result.checkpoint / "adapter_model.safetensors").is_file()
    rows = [json.loads(line) for line in (result.directory / "samples.jsonl").read_text().splitlines()]
    assert result.samples == rows
    assert [row["prompt"] for row in rows] == ["q4", "q5"]
    assert result.report == result.directory / "report.html"
    assert "<html" in result.report.read_text()
    assert repr(result).startswith("<Outcome of oaif: 1 steps, mean reward ")
    assert isinstance(result.policy, palate.Policy)
    kept = config_of(result)
    assert (kept["data"], kept["eval_data"]) == ("4 rows given in Python", "2 rows given in Python")
    assert kept["reward"] == ["function long given in Python"]


def test_no_samples_without_held_out_data(train: Train) -> None:
    result = train(eval_data=None)
    assert result.samples == []
    assert repr(result).startswith("<Outcome of oaif: 1 steps, in ")


def test_the_same_arguments_give_the_same_run(train: Train) -> None:
    first = train()
    again = train(data=[dict(row) for row in ROWS[:4]])
    assert again.summary == first.summary
    assert again.samples == first.samples
    longer = train(steps=2)
    assert longer.summary["steps"] == 2
    assert len((longer.directory / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": [{"prompt": "other", "n": 0}, *ROWS[1:4]]}, "the data changed since the run"),
        ({"data": [{**ROWS[0], "n": 9}, *ROWS[1:4]]}, "the data changed since the run"),
        ({"data": ROWS[:3]}, "data is '4 rows given in Python' there and '3 rows given in Python' here"),
        (
            {"reward": weighted(2.0)},
            "the code of the function weighted.<locals>.reward given in Python changed since",
        ),
        ({"reward": (2.0, weighted(1.0))}, "there and .'2[*]function weighted"),
        ({"reward": "length:3"}, "there and .'length:3'. here"),
    ],
)
def test_other_objects_are_refused(train: Train, changes: dict[str, Any], message: str) -> None:
    train(reward=weighted(1.0))
    with pytest.raises(RunError, match=message):
        train(**{"reward": weighted(1.0), **changes})
    assert train(reward=weighted(1.0)).summary["steps"] == 1  # it is still there


def test_objects_and_names_add_up(train: Train) -> None:
    scorer = ScriptedScorer(lambda text: 1.0, name="one")
    result = train(reward=[long, (0.5, scorer), "2*length:3"])
    assert result.evaluation is not None
    group = result.evaluation.after[0]
    assert group.parts.keys() == {"long", "one", "length:3"}
    parts = [group.parts[name][0] for name in ("long", "one", "length:3")]
    assert group.rewards is not None
    assert group.rewards[0] == pytest.approx(parts[0] + 0.5 * parts[1] + 2 * parts[2])  # type: ignore[operator]


def test_a_judge(train: Train) -> None:
    judge = ScriptedJudge(lambda first, second: float(len(first) >= len(second)), name="longer")
    result = train(reward=judge)
    assert config_of(result)["reward"] == ["judge longer given in Python"]
    assert result.summary["compared"] == 2
    for wrong in ([judge, long], (0.5, judge)):
        with pytest.raises(AnnotatorError, match="have a judge, which compares completions"):
            train(reward=wrong, overwrite=True)


def test_a_judge_has_no_scale_for_thresholds() -> None:
    judge = ScriptedJudge(lambda first, second: 0.5, name="even")
    with pytest.raises(
        palate.ConfigError, match="'judge even given in Python', whose numbers are comparable within one"
    ):
        palate.train("rest", data=ROWS, reward=judge)


def test_pairs_given_in_python(tiny: str, tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i * i}"} for i in range(6)]
    fixed: dict[str, Any] = {
        "model": tiny,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 2,
        "display": None,
    }
    result = palate.train("dpo", data=pairs[:4], eval_data=pairs[4:], output=tmp_path / "dpo", **fixed)
    assert result.summary["pairs"] == 4
    assert result.summary["held_out_pairs"] == 2
    more: dict[str, Any] = {"reward": long, "rounds": 2, "steps": 1, "n": 2, "max_new_tokens": 4}
    result = palate.train(
        "iterative-dpo", data=ROWS, pairs=pairs, output=tmp_path / "iterative", **more, **fixed
    )
    assert config_of(result)["pairs"] == "6 rows given in Python"


def test_progress_is_shown_unless_it_is_silenced(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train()
    assert capsys.readouterr() == ("", "")
    train(display="auto", overwrite=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    title, *_, step = shown.err.splitlines()
    assert title.startswith("oaif  ")
    assert step.startswith("step 1/1  reward ")
