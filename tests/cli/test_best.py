from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.cli import main
from palate.cli.best import gain, keep_best
from palate.config import RewardConfig
from palate.errors import AnnotatorError, BudgetError
from palate.testing import FaultyServer, judge_reply
from palate.types import Completion, Group, Prompt


def group(*texts: str) -> Group:
    return Group(Prompt("p"), tuple(Completion(text, tuple(text.encode())) for text in texts))


def test_the_best_is_kept_with_its_reward() -> None:
    said: list[str] = []
    kept = keep_best(
        [group("a b c", "a", "a b"), group("x", "x y")], RewardConfig(reward="length:2"), {}, said.append
    )
    assert [[c.text for c in g.completions] for g in kept] == [["a b"], ["x y"]]
    assert [g.rewards for g in kept] == [(0.0,), (0.0,)]
    assert len(said) == 1
    assert said[0].startswith("expected reward of the best of n")


def test_the_gain_is_the_expected_maximum() -> None:
    line = gain([group("a", "b").annotated((0.0, 1.0)), group("a", "b").annotated((2.0, 2.0))])
    assert line.endswith("1: 1.250 (0.00 nats), 2: 1.500 (0.19 nats)")


def test_a_prompt_without_any_reward_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "none.py"
    file.write_text("def f(prompts, completions, **_):\n    return [None for _ in completions]\n")
    with pytest.raises(AnnotatorError, match="none can be chosen"):
        keep_best([group("a", "b")], RewardConfig(reward=f"{file}:f"), {}, lambda text: None)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--best-of 4", "nothing chooses the best"),
        ("--reward length:3", "has no effect without best_of"),
        ("--best-of 4 --n 2 --reward length:3", "n and best_of are both given"),
    ],
)
def test_mistakes(flags: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--prompt", "hi", *flags.split()]) == 2
    assert words in capsys.readouterr().err


def test_the_command(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"sample --model {tiny} --prompt hi --best-of 3 --reward length:2 --max-new-tokens 6 --json"
    assert main([*line.split(), "--dtype", "float32", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    (row,) = [json.loads(text) for text in out.splitlines()]
    assert row["reward"] <= 0
    assert "expected reward of the best of n" in " ".join(err.split())


def test_a_limit_does_not_promise_to_resume(tmp_path: Path) -> None:
    with FaultyServer(lambda body, number: judge_reply(body, lambda a, b: 0.5)) as server:
        cfg = RewardConfig(judge=f"server:m@{server.url}", max_verdicts=1, judge_key_env="NO_KEY")
        with pytest.raises(BudgetError, match="keeps no verdicts") as error:
            keep_best([group("a", "b")], cfg, {}, lambda text: None)
    assert "resume" not in str(error.value)
