from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

from palate import statistics
from palate.statistics import rate_interval
from palate.winrates import (
    PRIOR,
    Verdict,
    discrete_win_rate,
    length_controlled,
    standard_error,
    win_rate,
)

LEADERBOARD = (
    Path(__file__).parents[1].parent / "shared" / "data" / "alpaca_eval" / "leaderboard-sample.jsonl.gz"
)


def published() -> list[tuple[dict[str, float], list[Verdict]]]:
    """Published numbers and verdicts of the models of a leaderboard."""
    if not LEADERBOARD.exists():
        pytest.skip(f"{LEADERBOARD.name} is not beside the project: it is drawn from AlpacaEval's repository")
    with gzip.open(LEADERBOARD, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["published"], [Verdict(p, mine, base) for base, mine, p in row["rows"]]) for row in rows]


def test_plain_win_rates_equal_the_published_ones() -> None:
    for numbers, verdicts in published():
        preferences = [v.preference for v in verdicts]
        assert 100 * win_rate(preferences) == pytest.approx(numbers["win_rate"], abs=1e-6)
        assert 100 * standard_error(preferences) == pytest.approx(numbers["standard_error"], abs=1e-6)
        assert 100 * discrete_win_rate(preferences) == pytest.approx(numbers["discrete_win_rate"], abs=1e-6)


def test_verdicts_that_repeat_a_prompt_add_no_certainty() -> None:
    random = np.random.default_rng(0)
    once = [
        Verdict(float(random.random() < 0.6), *map(float, random.integers(50, 200, 2))) for _ in range(50)
    ]
    error = length_controlled(once, range(50)).standard_error
    often = length_controlled(once * 8, [*range(50)] * 8)
    assert often.standard_error == pytest.approx(error, rel=0.05)
    assert length_controlled(once * 8).standard_error < 0.5 * error


def test_length_controlled_win_rates_are_near_the_published_ones_and_in_their_order() -> None:
    rows = published()
    theirs = [numbers["length_controlled_winrate"] for numbers, _ in rows]
    ours = [100 * length_controlled(verdicts).rate for _, verdicts in rows]
    assert np.abs(np.subtract(ours, theirs)).mean() < 3
    assert np.argsort(ours).tolist() == np.argsort(theirs).tolist()


def verdicts_of(
    quality: float, lengths: np.ndarray, effect: float, *, seed: int, hard: bool = False
) -> list[Verdict]:
    """Verdicts of a judge that likes quality and length, about texts against a baseline of length 1000."""
    draws = np.random.default_rng(seed)
    base = draws.normal(1000, 200, len(lengths))
    scaled = np.tanh((lengths - base) / 400)
    p = 1 / (1 + np.exp(-quality - effect * scaled))
    seen = (draws.random(len(p)) < p).astype(float) if hard else p
    return [Verdict(float(w), float(n), float(b)) for w, n, b in zip(seen, lengths, base, strict=True)]


@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.0])
def test_a_model_that_only_adds_length_gains_nothing(quality: float) -> None:
    draws = np.random.default_rng(1)
    lengths = draws.normal(1000, 300, 3000)
    short = verdicts_of(quality, lengths, 1.5, seed=2)
    long = verdicts_of(quality, lengths + 300, 1.5, seed=2)
    plain = [win_rate([v.preference for v in side]) for side in (short, long)]
    controlled = [length_controlled(side).rate for side in (short, long)]
    assert plain[1] - plain[0] > 0.08  # the judge is fooled
    assert abs(controlled[1] - controlled[0]) < 0.3 * (plain[1] - plain[0])
    assert controlled[0] == pytest.approx(1 / (1 + math.exp(-quality)), abs=0.03)


def test_without_an_effect_of_length_the_win_rate_stays() -> None:
    verdicts = verdicts_of(0.4, np.random.default_rng(3).normal(1200, 300, 3000), 0.0, seed=4)
    found = length_controlled(verdicts)
    assert found.rate == pytest.approx(win_rate([v.preference for v in verdicts]), abs=0.005)
    assert abs(found.length_effect) < 0.05


def test_the_interval_covers_the_rate() -> None:
    true = 1 / (1 + math.exp(-0.5))
    covered = 0
    for seed in range(200):
        lengths = np.random.default_rng(1000 + seed).normal(1050, 300, 400)
        found = length_controlled(verdicts_of(0.5, lengths, 0.6, seed=seed, hard=True))
        covered += found.low <= true <= found.high
    assert covered >= 184  # 3 standard errors below 95 % of 200 are 181


def test_lengths_that_differ_by_the_same_amount_say_nothing_about_length() -> None:
    verdicts = [Verdict(p, 150.0, 100.0) for p in (1.0, 1.0, 0.0, 1.0)]
    found = length_controlled(verdicts)
    assert found.length_effect == 0.0
    assert found.rate == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize("preference", [0.0, 1.0])
def test_a_model_that_always_wins_or_loses_has_a_finite_rate(preference: float) -> None:
    verdicts = [Verdict(preference, 10.0 + i, 12.0) for i in range(20)]
    assert length_controlled(verdicts).rate == pytest.approx(preference, abs=0.02)


def test_ties_count_half() -> None:
    assert discrete_win_rate([0.5, 0.5, 0.9]) == pytest.approx(2 / 3)
    assert win_rate([0.5, 1.0]) == 0.75


def test_without_verdicts_there_is_no_rate() -> None:
    assert math.isnan(win_rate([]))
    assert math.isnan(discrete_win_rate([]))
    assert math.isnan(standard_error([0.5]))


@pytest.mark.parametrize(("preference", "n"), [(1.0, 14), (0.0, 14), (0.5, 14), (1.0, 100)])
def test_verdicts_that_are_all_alike_give_no_certainty(preference: float, n: int) -> None:
    found = length_controlled([Verdict(preference, 10.0 + i % 7, 12.0) for i in range(n)])
    plain = rate_interval([preference] * n)
    # The plain interval knows less, since it estimates nothing else, so it bounds the width from below.
    assert found.high - found.low >= 0.8 * (plain.high - plain.low)


def test_the_interval_covers_a_rate_near_one() -> None:
    true = 1 / (1 + math.exp(-3))
    covered = 0
    for seed in range(200):
        lengths = np.random.default_rng(seed).normal(1000, 30, 40)
        found = length_controlled(verdicts_of(3, lengths, 0.5, seed=seed, hard=True))
        covered += found.low <= true <= found.high
    assert covered >= 181  # 3 standard errors below 95 % of 200


def test_both_kinds_of_interval_have_the_same_prior() -> None:
    assert PRIOR == statistics.PRIOR
