from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from palate.statistics import rate_interval, wilson

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from coverage import DESIGNS, Design, coverage

OUTCOME = st.sampled_from([0.0, 0.5, 1.0])
CLUSTERED = st.lists(st.tuples(OUTCOME, st.integers(0, 6)), min_size=1, max_size=40)

# ---- wilson ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("trials", [1, 2, 10, 37, 1000])
def test_against_scipy(trials: int, confidence: float) -> None:
    for wins in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        low, high = wilson(wins / trials, trials, confidence=confidence)
        theirs = binomtest(wins, trials).proportion_ci(confidence, method="wilson")
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("trials", [20, 100])
def test_it_covers_the_truth_as_often_as_it_says(trials: int) -> None:
    # Exactly: for a true rate, the chance of those counts whose interval holds it. It saws about the
    # nominal level, so its mean over the rates is what must be near it.
    intervals = np.array([wilson(k / trials, trials) for k in range(trials + 1)])
    rates = np.linspace(0.02, 0.98, 481)
    holds = (intervals[:, :1] <= rates) & (rates <= intervals[:, 1:])  # (counts, rates)
    chances = binom.pmf(np.arange(trials + 1)[:, None], trials, rates)
    held = (holds * chances).sum(0)
    assert 0.945 < held.mean() < 0.96
    assert held.min() > 0.83  # the known dip at the edges; Wald's interval falls to 0.3


def test_without_trials_nothing_is_known() -> None:
    assert wilson(math.nan, 0) == (0.0, 1.0)


@pytest.mark.parametrize("trials", [1, 5, 10**6])
def test_all_lost_and_all_won(trials: int) -> None:
    low, high = wilson(0.0, trials)
    assert 0.0 <= low < 1e-12
    assert low < high < 1.0
    mirrored = wilson(1.0, trials)
    assert mirrored == pytest.approx((1.0 - high, 1.0), abs=1e-12)
    assert mirrored[1] <= 1.0


def test_more_trials_narrow_it() -> None:
    widths = [high - low for low, high in (wilson(0.5, trials) for trials in (1, 10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] / widths[3] == pytest.approx(math.sqrt(10), rel=0.05)


# ---- rate_interval ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prompts", [5, 20, 100])
@pytest.mark.parametrize("design", DESIGNS, ids=lambda design: design.name)
def test_simulated_coverage(design: Design, prompts: int) -> None:
    # 2,000 simulations: a true coverage of 0.93 or 0.985 stays within four standard deviations of itself.
    found = coverage(design, prompts, simulations=400, seed=1)["interval"]
    spread = 4 * math.sqrt(0.93 * 0.07 / 2000)
    # Few prompts cannot show that their pairs are independent; elsewhere it is 0.97 at most.
    most = 0.985 if design.correlation == 0 and prompts < 50 else 0.97
    assert 0.93 - spread < found < most + spread * 0.7


@pytest.mark.parametrize("side", ["prompts", "pairs"])
def test_the_simulation_shows_intervals_that_are_too_narrow(side: str) -> None:
    design = next(d for d in DESIGNS if d.correlation == 1 and "200" in d.name)
    assert coverage(design, 50, simulations=100, seed=1)[side] < 0.85


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40))
def test_a_coin_for_each_prompt_is_wilsons(outcomes: list[float]) -> None:
    found = rate_interval(outcomes)
    assert found.rate == pytest.approx(np.mean(outcomes))
    assert (found.low, found.high) == pytest.approx(wilson(found.rate, len(outcomes)), abs=1e-9)
    assert found.trials == pytest.approx(len(outcomes))


def test_a_prompt_that_is_asked_twice_is_not_two_prompts() -> None:
    outcomes = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    once = rate_interval(outcomes, "abcdef")
    twice = rate_interval(outcomes * 2, "abcdef" * 2)
    assert twice == pytest.approx(once, abs=1e-12)
    assert rate_interval(outcomes * 2).high < once.high


def test_one_prompt_with_most_of_the_pairs() -> None:
    # 5 prompts, of which one has 46 of 50 pairs: little more than one trial.
    outcomes, clusters = [1.0] * 46 + [0.0, 1.0, 0.0, 1.0], [0] * 46 + [1, 2, 3, 4]
    assert rate_interval(outcomes, clusters).trials == pytest.approx(1 / (0.92**2 + 4 * 0.02**2), rel=0.05)


def test_ties_narrow_it_but_a_few_of_them_are_no_certainty() -> None:
    coins, ties = [1.0, 0.0] * 10, [0.5] * 20
    assert rate_interval(ties).high < rate_interval(coins).high
    assert rate_interval([0.5] * 5).high > 0.6


@given(CLUSTERED)
def test_what_holds_for_any_outcomes(rows: list[tuple[float, int]]) -> None:
    outcomes, clusters = zip(*rows, strict=True)
    found = rate_interval(outcomes, clusters)
    assert 0.0 <= found.low <= found.rate <= found.high <= 1.0
    shares = np.bincount(clusters) / len(clusters)
    assert found.trials >= 1 / np.square(shares).sum() - 1e-6  # no fewer than the prompts are worth as coins
    mirrored = rate_interval([1 - outcome for outcome in outcomes], clusters)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    again = rate_interval(outcomes[::-1], clusters[::-1])
    assert again == pytest.approx(found, abs=1e-9)


def test_no_outcomes() -> None:
    found = rate_interval([])
    assert math.isnan(found.rate)
    assert (found.low, found.high) == (0.0, 1.0)


@pytest.mark.parametrize("outcome", [-0.1, 1.1, math.nan, math.inf])
def test_outcomes_that_are_none(outcome: float) -> None:
    with pytest.raises(ValueError, match="an outcome lies outside"):
        rate_interval([1.0, outcome])


def test_every_outcome_has_its_cluster() -> None:
    with pytest.raises(ValueError, match="2 outcomes have 1 clusters"):
        rate_interval([1.0, 0.0], ["a"])
