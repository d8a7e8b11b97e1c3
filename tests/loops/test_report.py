from __future__ import annotations

import math

import pytest

from palate.loops.report import fresh_logps, group_numbers, sample_numbers
from palate.select import Drop
from palate.types import Completion, Finish, Group, Prompt


def completion(length: int, finish: Finish = "eos", logps: tuple[float, ...] | None = None) -> Completion:
    return Completion("x", tuple(range(1, length + 1)), finish, 0 if logps else None, logps)


def group(*completions: Completion, rewards: tuple[float | None, ...] | None = None, **parts: tuple) -> Group:
    bare = Group(Prompt("p"), completions)
    return bare if rewards is None else bare.annotated(rewards, **parts)


TWO = [
    group(completion(2), completion(4, "length"), rewards=(1.0, 3.0), a=(1.0, 2.0), b=(0.0, None)),
    group(completion(6, "stop"), completion(8), rewards=(None, 2.0), a=(3.0, 4.0), b=(1.0, 2.0)),
]


def test_rewards() -> None:
    numbers = sample_numbers(TWO)
    assert numbers["objective/scores"] == 2.0  # of 1, 3 and 2
    assert numbers["objective/scores_std"] == pytest.approx(math.sqrt(2 / 3))
    assert numbers["objective/scores_margin"] == 2.0  # of the first group; the second has one reward
    assert numbers["objective/unusable"] == 1
    assert numbers["frac_reward_zero_std"] == 0.0
    assert (numbers["objective/scores/a"], numbers["objective/scores/b"]) == (2.5, 1.0)


def test_lengths_and_ends() -> None:
    numbers = sample_numbers(TWO)
    lengths = [numbers[f"completions/{which}_length"] for which in ("min", "mean", "max", "mean_terminated")]
    assert lengths == [2, 5, 8, pytest.approx(16 / 3)]
    assert numbers["completions/clipped_ratio"] == 0.25
    assert numbers["val/contain_eos_token"] == 0.5


def test_ties() -> None:
    groups = [group(completion(1), completion(2), rewards=(1.0, top)) for top in (1.0, 1.0, 2.0, 3.0)]
    assert sample_numbers(groups)["frac_reward_zero_std"] == 0.5


def test_where_nobody_scores_nothing_is_said_of_scores() -> None:
    numbers = sample_numbers([group(completion(2)), group(completion(4, "length"))])
    assert not [name for name in numbers if name.startswith("objective/") or "reward" in name]
    assert numbers["completions/mean_length"] == 3


def test_where_no_reward_is_usable() -> None:
    numbers = sample_numbers([group(completion(2), completion(2), rewards=(None, None))])
    assert numbers["objective/unusable"] == 2
    assert "objective/scores" not in numbers


def test_log_probabilities_of_fresh_samples_are_per_token() -> None:
    # Three tokens of -1 and one of -3: -1.5 a token, and not the mean of the two completions' means, -2.
    fresh = group(completion(3, logps=(-1.0, -1.0, -1.0)), completion(1, logps=(-3.0,)))
    assert fresh_logps([fresh]) == {"logps/fresh": -1.5}
    assert sample_numbers([fresh])["logps/fresh"] == -1.5


def test_completions_from_data_are_not_fresh() -> None:
    assert fresh_logps([group(completion(3))]) == {}
    mixed = group(completion(3), completion(2, logps=(-1.0, -2.0)))
    assert fresh_logps([mixed]) == {"logps/fresh": -1.5}


def test_what_became_of_the_groups() -> None:
    numbers = group_numbers(TWO, {Drop.TIE: 1})
    assert (numbers["pairs/kept"], numbers["pairs/dropped"], numbers["pairs/dropped_tie"]) == (1, 1, 1)
    assert group_numbers(TWO, {Drop.TIE: 1}, kept=7)["pairs/kept"] == 7
