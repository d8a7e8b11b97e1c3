from __future__ import annotations

import functools
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pytest

from palate.config import DataConfig, RewardConfig
from palate.data import Account, read_prompts, read_rows
from palate.errors import DataError
from palate.given import GivenReward, GivenRows, is_judge
from palate.testing import ScriptedJudge, ScriptedScorer

ROWS = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]


def brief(completions: list[str], **_: object) -> list[float]:
    return [float(-len(text)) for text in completions]


def given(value: Any) -> str:
    return DataConfig(data=value).data


# ---- Rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)])
def test_rows_are_read_as_those_of_a_file(rows: Any) -> None:
    source = given(rows)
    assert source == "2 rows given in Python"
    assert [(row.columns, row.where) for row in read_rows(source)] == [
        (ROWS[0], "row 1 given in Python"),
        (ROWS[1], "row 2 given in Python"),
    ]
    assert [(p.text, p.columns) for p in read_prompts(source, limit=1)] == [("a", {"n": 1})]


def test_splits() -> None:
    source = given(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))
    assert len(list(read_rows(source))) == 2
    with pytest.raises(DataError, match=r"no split 'test'; they are splits train given in Python"):
        read_rows(source, split="test")


def test_tensors_of_a_data_set_become_plain_values() -> None:
    rows = datasets.Dataset.from_list(ROWS).with_format("torch")
    (first, _) = read_rows(given(rows))
    assert first.columns == ROWS[0]
    assert type(first.columns["n"]) is int


def test_a_column_that_is_no_json_is_passed_on() -> None:
    (row,) = read_rows(given([{"prompt": "a", "path": Path("x")}]))
    assert row.columns["path"] == Path("x")


LOOP: list[object] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "the row is a string"),
        (None, "the row is null"),
        (3, "the row is a number"),
        (object(), "the row is of type object"),
        ({"prompt": "half \ud83d"}, "half a surrogate pair"),
        ({1: "a", "prompt": "b"}, "the name of a column is not a text"),
        ({"prompt": "a", "loop": LOOP}, "a value that JSON cannot express"),
        ({"prompt": ["not", "turns"]}, ""),
        ({}, ""),
    ],
)
def test_bad_rows_are_counted_as_those_of_a_file(row: object, reason: str) -> None:
    account = Account(max_bad_rows=0.5)
    prompts = read_prompts(given([*ROWS[:2], row, ROWS[1] | {"when": date(2026, 1, 1)}]), account=account)
    assert len(prompts) == 3 if reason else len(prompts) >= 2
    assert account.bad == 1
    assert account.skipped[0].where.startswith("row 3 given in Python")
    if reason:
        assert account.skipped[0].reason == reason


def test_a_first_row_that_is_bad_is_one_bad_row() -> None:
    account = Account(max_bad_rows=0.5)
    assert len(read_prompts(given(["text", *ROWS]), account=account)) == len(ROWS)
    assert account.bad == 1


def test_mistakes_in_rows() -> None:
    with pytest.raises(DataError, match="0 rows given in Python has no rows"):
        read_rows(given([]))
    with pytest.raises(DataError, match="row 2 given in Python is a string; expected an object"):
        list(read_rows(given([ROWS[0], "b"])))
    with pytest.raises(DataError, match=r"row 1 given in Python: prompt is missing.* Columns: text\."):
        read_prompts(given([{"text": "a"}]))
    for wrong in (["a"], iter(ROWS), {1}):
        with pytest.raises(ValueError, match="expected a path, a hub id, a list of rows"):
            given(wrong)


def test_a_path() -> None:
    assert given(Path("a/b.jsonl")) == "a/b.jsonl"


# ---- Rewards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reward", "text"),
    [
        (brief, "function brief given in Python"),
        (functools.partial(brief, x=1), "function brief given in Python"),
        (ScriptedScorer(lambda text: 1.0, name="mine"), "scorer mine given in Python"),
        (ScriptedJudge(lambda a, b: 1.0, name="mine"), "judge mine given in Python"),
        ((0.5, brief), "0.5*function brief given in Python"),
        ((2, "length:3"), "2.0*length:3"),
        ("length:3", "length:3"),
    ],
)
def test_rewards_in_words(reward: Any, text: str) -> None:
    cfg = RewardConfig(reward=reward)
    assert cfg.reward == (text,)
    assert cfg.model_dump(mode="json")["reward"] == [text]
    assert is_judge(cfg.reward[0]) == text.startswith("judge")
    again = RewardConfig(reward=cfg.reward).reward[0]
    assert getattr(again, "reward", None) is getattr(cfg.reward[0], "reward", None)


def test_a_list_of_rewards() -> None:
    mixed: Any = ["length:3", brief, (0.5, brief)]
    one, two, three = RewardConfig(reward=mixed).reward
    assert one == "length:3"
    assert isinstance(two, GivenReward)
    assert isinstance(three, GivenReward)
    assert (two.weight, three.weight) == (1.0, 0.5)


def test_mistakes_in_rewards() -> None:
    with pytest.raises(ValueError, match="ScriptedScorer is a class, expected an object"):
        RewardConfig(reward=ScriptedScorer)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="valid string"):
        RewardConfig(reward=[brief, 5])  # type: ignore[arg-type]


def test_what_is_given_is_kept_by_copies() -> None:
    rows = GivenRows(ROWS)
    cfg = DataConfig(data=rows)
    assert DataConfig(**cfg.model_dump()).data is rows
    assert cfg.model_copy(update={"split": "x"}).data is rows
