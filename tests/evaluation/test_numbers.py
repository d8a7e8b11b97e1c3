from __future__ import annotations

import math

import pytest

from palate.evaluation.numbers import best_numbers, finite, reward_numbers, win_numbers
from palate.types import Completion, Group, Prompt


def group(*rewards: float | None, prompt: str = "p") -> Group:
    texts = tuple(Completion("x" * (i + 1), (1,) * (i + 1)) for i in range(len(rewards)))
    return Group(Prompt(prompt), texts, rewards)


def test_wins_ties_and_losses() -> None:
    groups = [group(0, 1), group(1, 1), group(2, 1), group(None, 1)]
    numbers = win_numbers(groups, 1, scale="score")
    assert (numbers["wins"], numbers["ties"], numbers["losses"], numbers["unusable"]) == (1, 1, 1, 1)
    assert numbers["win_rate"] == 0.5


def test_pairs_of_a_prompt_are_one_cluster() -> None:
    rewards = [(0, 1)] * 8 + [(1, 0)] * 8
    of_two = [group(*own, prompt=str(i // 8)) for i, own in enumerate(rewards)]
    of_many = [group(*own, prompt=str(i)) for i, own in enumerate(rewards)]
    together, apart = win_numbers(of_two, 8, scale="score"), win_numbers(of_many, 1, scale="score")
    assert together["win_rate"] == apart["win_rate"]
    assert (
        together["win_rate_high"] - together["win_rate_low"] > apart["win_rate_high"] - apart["win_rate_low"]
    )


def test_a_judges_probabilities_are_used_at_equal_length() -> None:
    groups = [group(0.4, 0.6), group(0.45, 0.55), group(0.4, 0.6)]
    assert win_numbers(groups, 1, scale="probability")["win_rate"] == 1
    assert 0.5 < win_numbers(groups, 1, scale="probability")["length_controlled_win_rate"] < 0.62


def test_the_log_odds_of_a_ranker_are_used_as_probabilities() -> None:
    chances = (0.6, 0.55, 0.6)
    odds = [group(0.0, math.log(p / (1 - p))) for p in chances]
    same = [group(1 - p, p) for p in chances]
    by_odds, by_chance = win_numbers(odds, 1, scale="log-odds"), win_numbers(same, 1, scale="probability")
    assert by_odds == pytest.approx(by_chance, nan_ok=True)


@pytest.mark.parametrize(
    ("penalised", "same"),
    [((0.4 - 1.0, 0.6 - 1.0), (0.4, 0.6)), ((0.9 - 1.0, 0.1), (0.4, 0.6)), ((0.1 - 1.0, 0.9), (0.0, 1.0))],
)
def test_penalties_move_a_probability_within_its_range(
    penalised: tuple[float, float], same: tuple[float, float]
) -> None:
    ours, expected = ([group(*own)] * 4 for own in (penalised, same))
    numbers = win_numbers(ours, 1, scale="probability")
    assert numbers == pytest.approx(win_numbers(expected, 1, scale="probability"), nan_ok=True)


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
    numbers = win_numbers([group(None, 1)], 1, scale="score")
    assert "length_controlled_win_rate" not in numbers
    assert numbers["win_rate"] != numbers["win_rate"]
    assert pytest.approx(numbers["win_rate_low"]) == 0


def test_rows_that_repeat_a_prompt_are_one_cluster() -> None:
    repeated = [group(0, 1, prompt="p") for _ in range(4)] + [group(1, 0, prompt="q") for _ in range(4)]
    rows, pairs = win_numbers(repeated, 1, scale="score"), win_numbers(repeated, 4, scale="score")
    for name in ("win_rate", "win_rate_low", "win_rate_high", "standard_error"):
        assert rows[name] == pytest.approx(pairs[name])
    assert rows["standard_error"] == pytest.approx(0.5)


def test_the_error_of_a_reward_is_that_over_prompts() -> None:
    groups = [group(0, r, prompt=p) for p, r in (("p", 1.0), ("p", 1.0), ("q", 3.0), ("q", 3.0))]
    numbers = reward_numbers(groups, 1)
    assert (numbers["reward"], numbers["reward_standard_error"]) == (2.0, pytest.approx(1.0))
