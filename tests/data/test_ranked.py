from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from palate.data.account import Account
from palate.data.ranked import CONTRADICTORY, read_rankings
from palate.errors import DataError


def source(tmp_path: Path, *rows: dict[str, Any]) -> str:
    path = tmp_path / "ranked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_lists_with_scores(tmp_path: Path) -> None:
    (one,) = read_rankings(source(tmp_path, {"prompt": "q", "completions": ["a", "b"], "scores": [1, 2.5]}))
    assert (one.prompt.text, one.answers, one.gold, one.comparable) == ("q", ("a", "b"), (1.0, 2.5), True)


def test_lists_with_ranks(tmp_path: Path) -> None:
    (one,) = read_rankings(
        source(tmp_path, {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]})
    )
    assert (one.gold, one.comparable) == ((-2.0, 0.0, -1.0), False)


def test_rows_of_one_answer_are_put_together(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "rank": 0}, {"prompt": "p", "completion": "x", "rank": 0},
            {"prompt": "q", "completion": "b", "rank": 1}, {"prompt": "p", "completion": "y", "rank": 1},
            {"prompt": "alone", "completion": "z", "rank": 0}]  # fmt: skip
    account = Account()
    q, p = read_rankings(source(tmp_path, *rows), account=account)
    assert (q.answers, q.gold) == (("a", "b"), (0.0, -1.0))
    assert p.answers == ("x", "y")
    assert account.dropped["a prompt has only one answer"].count == 1


def test_pairs(tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "bad"}]
    (one,) = read_rankings(source(tmp_path, {"prompt": "q", "chosen": "good", "rejected": turns}))
    assert (one.answers, one.gold) == (("good", "bad"), (1.0, 0.0))


@pytest.mark.parametrize(
    "row",
    [
        {
            "instruction": "q",
            "completions": [{"response": "a", "overall_score": 4}, {"response": "b", "overall_score": 7.5}],
        },
        {"instruction": "q", "generations": ["a", "b"], "ratings": [4, 7.5]},
        {"prompt": "q", "responses": ["a", "b"], "rewards": [4, 7.5]},
        {"prompt": "q", "generations": ["a", "b"], "rating": [4, 7.5]},
    ],
)
def test_forms_of_other_toolkits(tmp_path: Path, row: dict[str, Any]) -> None:
    (one,) = read_rankings(source(tmp_path, row))
    assert (one.prompt.text, one.answers, one.gold, one.comparable) == ("q", ("a", "b"), (4.0, 7.5), True)


def test_a_prompt_of_turns(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "q"}]
    (one,) = read_rankings(source(tmp_path, {"prompt": prompt, "completions": ["a", "b"], "scores": [0, 1]}))
    assert one.prompt.content == tuple(prompt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "q", "completions": ["a", "b"]},
            r"ranked.jsonl:1: no score is given; expected .* scores",
        ),
        ({"prompt": "q", "scores": [1, 2]}, "no answer is given; expected a column completion"),
        ({"prompt": "q", "completions": ["a"], "scores": [1, 2]}, "not lists of the same length"),
        ({"prompt": "q", "completions": ["a", 3], "scores": [1, 2]}, "an answer is 3; expected a text"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, "x"]}, "'x'; expected a number"),
        ({"prompt": "q", "completions": ["a", "b"], "scores": [1, 10**400]}, "0; expected a number"),
        ({"prompt": "q", "completion": "a", "score": 1}, "no prompt has two answers"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_rankings(source(tmp_path, row))


def test_contradictions_are_left_out_by_reason(tmp_path: Path) -> None:
    rows = [
        {"prompt": "same", "chosen": "a", "rejected": "a"},
        {"prompt": "twice", "completions": ["a", "b", "a", "c"], "scores": [1, 2, 3, 4]},
        {"prompt": "again", "completions": ["a", "b", "a"], "scores": [1, 2, 1]},  # no contradiction
        {"prompt": "mixed", "completion": "a", "score": 1}, {"prompt": "mixed", "completion": "b", "rank": 1},
        {"prompt": "alone", "completion": "a", "score": 1},
        {"prompt": "left", "completions": ["a", "b", "a"], "ranks": [1, 2, 3]},
    ]  # fmt: skip
    account = Account()
    twice, again = read_rankings(source(tmp_path, *rows), account=account)
    assert (twice.answers, twice.gold) == (("b", "c"), (2.0, 4.0))
    assert again.answers == ("a", "b", "a")
    assert {reason: tally.count for reason, tally in account.dropped.items()} == {
        "chosen and rejected are the same": 1,
        "a prompt has scores in some rows and ranks in others": 1,
        "a prompt has only one answer": 2,
    }
    assert account.notes[CONTRADICTORY].count == 2
