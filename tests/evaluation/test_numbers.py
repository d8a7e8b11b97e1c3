from __future__ import annotations

import pytest

from palate.evaluation.numbers import best_numbers, finite, win_numbers
from palate.types import Completion, Group, Prompt


def group(*rewards: float | None, prompt: str = "p") -> Group:
    texts = tuple(Completion("x" * (i + 1), (1,) * (i + 1)) for i in range(len(rewards)))
    return Group(Prompt(prompt), texts, rewards)


def test_wins_ties_and_losses() -> None:
    groups = [group(0, 1), group(1, 1), group(2, 1), group(None, 1)]
    numbers = win_numbers(groups, 1, pairwise=False)
    assert (numbers["wins"], numbers["ties"], numbers["losses"], numbers["unusable"]) == (1, 1, 1, 1)
    assert numbers["win_rate"] == 0.5


def test_pairs_of_a_prompt_are_one_cluster() -> None:
    alike = [group(0, 1)] * 8 + [group(1, 0)] * 8
    together, apart = win_numbers(alike, 8, pairwise=False), win_numbers(alike, 1, pairwise=False)
    assert together["win_rate"] == apart["win_rate"]
    assert (
        together["win_rate_high"] - together["win_rate_low"] > apart["win_rate_high"] - apart["win_rate_low"]
    )


def test_a_judges_probabilities_are_used_at_equal_length() -> None:
    groups = [group(0.4, 0.6), group(0.45, 0.55), group(0.4, 0.6)]
    assert win_numbers(groups, 1, pairwise=True)["win_rate"] == 1
    assert 0.5 < win_numbers(groups, 1, pairwise=True)["length_controlled_win_rate"] < 0.62


def test_the_best_of_all_shares_a_tie() -> None:
    rows = best_numbers([group(1, 1, 0), group(0, 2, 1), group(None, 1, 1)], ["a", "b", "c"])
    assert [row["best"] for row in rows] == [0.25, 0.75, 0]
    assert [row["score"] for row in rows] == [0.5, 1.5, 0.5]
    assert rows[0]["prompts"] == 2


def test_json_has_no_nan() -> None:
    assert finite({"a": [float("nan"), 1.0], "b": {"c": float("inf")}}) == {
        "a": [None, 1.0],
        "b": {"c": None},
    }


def test_win_rate_without_verdicts() -> None:
    numbers = win_numbers([group(None, 1)], 1, pairwise=False)
    assert "length_controlled_win_rate" not in numbers
    assert numbers["win_rate"] != numbers["win_rate"]
    assert pytest.approx(numbers["win_rate_low"]) == 0
