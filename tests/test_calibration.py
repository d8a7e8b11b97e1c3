from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.annotate import scored
from palate.calibration import (
    annotator_quality,
    before_and_after,
    expected_calibration_error,
    ranking_quality,
)
from palate.statistics import rate_interval
from palate.testing import ScriptedScorer
from palate.types import Completion, Pair, Prompt

MARGINS = st.lists(st.floats(-30, 30), min_size=1, max_size=30)


def pair(chosen: int, rejected: int, prompt: str = "Q") -> Pair:
    """Completions of so many tokens, with the numbers for texts."""
    return Pair(
        Prompt(prompt), Completion(f"{chosen}", (1,) * chosen), Completion(f"{rejected}", (2,) * rejected)
    )


def logit(p: float) -> float:
    return math.log(p / (1 - p))


# ---- Calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "right", "expected"),
    [
        (0.7, 7, 0.0),  # of ten pairs stated at 0.7, seven are as stated
        (0.7, 10, 0.3),
        (0.7, 0, 0.7),
        (0.95, 5, 0.45),
        (0.55, 6, 0.05),
    ],
)
def test_one_stated_probability(stated: float, right: int, expected: float) -> None:
    # All in one bin: |share right - stated|.
    margins = [logit(stated)] * right + [-logit(stated)] * (10 - right)
    assert expected_calibration_error(margins) == pytest.approx(expected, abs=1e-12)


def test_gaps_of_several_bins_are_weighed_by_their_pairs() -> None:
    # 2 of 6 pairs at 0.9, both right: gap 0.1. 4 at 0.6, one right: gap |1/4 - 0.6| = 0.35.
    margins = [logit(0.9)] * 2 + [logit(0.6)] + [-logit(0.6)] * 3
    assert expected_calibration_error(margins) == pytest.approx((2 * 0.1 + 4 * 0.35) / 6)


def test_gaps_of_one_bin_make_up_for_each_other() -> None:
    # 0.61 and 0.64 share the bin [0.6, 0.65): mean confidence 0.625, half of them right.
    margins = [logit(0.61), -logit(0.64)]
    assert expected_calibration_error(margins) == pytest.approx(0.125)
    # In bins of half the width they are apart: (0.39 + 0.64) / 2.
    assert expected_calibration_error(margins, bins=20) == pytest.approx((0.39 + 0.64) / 2)


def test_indifference_is_calibrated() -> None:
    assert expected_calibration_error([0.0] * 7) == 0.0


def test_certainty_without_end() -> None:
    assert expected_calibration_error([1e6] * 3) == 0.0
    assert expected_calibration_error([-1e6] * 3) == 1.0


def test_no_pairs_have_no_calibration() -> None:
    assert math.isnan(expected_calibration_error([]))


@pytest.mark.parametrize("bins", [0, -1])
def test_bins_that_are_none(bins: int) -> None:
    with pytest.raises(ValueError, match=f"bins is {bins}, expected at least 1"):
        expected_calibration_error([0.0], bins=bins)


def plain_ece(margins: Sequence[float], bins: int) -> float:
    """The usual ECE of P over [0, 1], of every pair in both orders."""
    stated = [(1 / (1 + math.exp(-m)), 1.0) for m in margins] + [
        (1 / (1 + math.exp(m)), 0.0) for m in margins
    ]
    total = 0.0
    for b in range(bins):
        inside = [(p, y) for p, y in stated if b / bins <= p < (b + 1) / bins]
        if inside:
            gap = sum(y for _, y in inside) / len(inside) - sum(p for p, _ in inside) / len(inside)
            total += len(inside) / len(stated) * abs(gap)
    return total


@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=40), st.integers(1, 8))
def test_it_is_the_usual_error_of_both_orders(probabilities: list[float], bins: int) -> None:
    # Away from the bins' edges, where rounding may put the two orders into bins that are no mirrors.
    kept = [p for p in probabilities if min(abs(p * 2 * bins - k) for k in range(2 * bins + 1)) > 1e-6]
    if kept:
        margins = [logit(p) for p in kept]
        found = expected_calibration_error(margins, bins=bins)
        assert found == pytest.approx(plain_ece(margins, 2 * bins), abs=1e-9)


def test_outcomes_drawn_by_the_stated_probability_are_calibrated() -> None:
    # With n outcomes drawn by p in each of ten bins, a bin's gap has the mean sqrt(2 p (1 - p) / (pi n)):
    # for n = 4000 at most 0.0063.
    rng = Random(0)
    stated = [0.5 + (b + 0.5) / 20 for b in range(10) for _ in range(4000)]
    margins = [logit(p) if rng.random() < p else -logit(p) for p in stated]
    assert expected_calibration_error(margins) < 0.0063


@given(MARGINS)
def test_it_is_a_share(margins: list[float]) -> None:
    assert 0.0 <= expected_calibration_error(margins) <= 1.0


# ---- The whole -------------------------------------------------------------------------------------

PAIRS = [pair(3, 1, "a"), pair(1, 3, "a"), pair(2, 5, "b"), pair(2, 2, "c"), pair(4, 6, "d")]
RANKED = [1.0, 2.0, -1.0, 0.0, 3.0]


def test_by_hand() -> None:
    found = ranking_quality(PAIRS, RANKED)
    assert found.pairs == 5
    assert found.accuracy == pytest.approx(3.5 / 5)  # a tie is half right
    # Prompt "a" has two of the five pairs.
    assert (found.accuracy_low, found.accuracy_high) == rate_interval([1, 1, 0, 0.5, 1], "aabcd")[1:3]
    # Chosen is the shorter one in the second, third and fifth; two of them are ranked rightly, of 3 prompts.
    assert found.shorter_pairs == 3
    assert found.accuracy_shorter == pytest.approx(2 / 3)
    assert (found.accuracy_shorter_low, found.accuracy_shorter_high) == rate_interval([1, 0, 1])[1:3]
    assert found.longer_wins == pytest.approx(1.5 / 5)  # the first, and half of the fourth
    assert found.margin == 1.0
    # log(1 + e^-m): 0.313262 + 0.126928 + 1.313262 + 0.693147 + 0.048587
    assert found.loss == pytest.approx(2.495186 / 5, abs=1e-6)
    assert found.ece == expected_calibration_error(RANKED)
    assert found.unusable == 0


def test_margins_far_out_have_a_finite_loss() -> None:
    assert ranking_quality(PAIRS[:2], [-2e3, 2e3]).loss == 1e3


def test_no_pair_in_which_the_shorter_is_better() -> None:
    found = ranking_quality(PAIRS[:1], [1.0])
    assert found.shorter_pairs == 0
    assert math.isnan(found.accuracy_shorter)
    assert (found.accuracy_shorter_low, found.accuracy_shorter_high) == (0.0, 1.0)
    assert not [name for name in found.numbers() if name.startswith("accuracy_shorter")]
    assert all(map(math.isfinite, found.numbers().values()))


def test_numbers_are_all_there() -> None:
    found = ranking_quality(PAIRS, RANKED)
    assert found.numbers() == vars(found)


@pytest.mark.parametrize("margins", [[1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_margins_that_are_none(margins: list[float]) -> None:
    with pytest.raises(ValueError, match=r"margins for 2 pairs, or not all finite; expected one number each"):
        ranking_quality(PAIRS[:2], margins)


@given(st.permutations(range(5)))
def test_order_is_nothing(order: list[int]) -> None:
    one = ranking_quality([PAIRS[i] for i in order], [RANKED[i] for i in order]).numbers()
    assert one == pytest.approx(ranking_quality(PAIRS, RANKED).numbers())


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_preferring_length_is_as_good_as_its_baseline(lengths: list[tuple[int, int]]) -> None:
    # A reward that is the length has the baseline's accuracy, and is wrong where the shorter one is better.
    pairs = [pair(*both) for both in lengths]
    found = annotator_quality(scored(ScriptedScorer(float)), pairs)
    assert found.accuracy == found.longer_wins
    assert found.accuracy_shorter == 0 or found.shorter_pairs == 0


def test_pairs_without_a_usable_reward_are_left_out_and_counted() -> None:
    scorer = ScriptedScorer(lambda text: None if text == "6" else float(text))
    found = annotator_quality(scored(scorer), PAIRS)
    # Of the four that are left, the first is right and the fourth a tie.
    assert (found.pairs, found.unusable, found.accuracy) == (4, 1, 1.5 / 4)


# ---- In a run's summary ----------------------------------------------------------------------------


def measured(margins: Sequence[float]) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in ranking_quality(PAIRS, margins).numbers().items()}


def test_before_and_after() -> None:
    other = {"eval_loss": 1.0}  # such as of another method's stage
    found = before_and_after([other, measured([0.0] * 5), measured([1.0] * 5), measured(RANKED), other])
    last = ranking_quality(PAIRS, RANKED)
    assert found == {
        "held_out_pairs": 5,
        "accuracy_before": 0.5,
        "accuracy_after": last.accuracy,
        "accuracy_low": last.accuracy_low,
        "accuracy_high": last.accuracy_high,
        "accuracy_shorter_before": 0.5,
        "accuracy_shorter_after": last.accuracy_shorter,
        "accuracy_shorter_low": last.accuracy_shorter_low,
        "accuracy_shorter_high": last.accuracy_shorter_high,
        "ece_before": 0.0,
        "ece_after": last.ece,
        "shorter_pairs": 3,
        "longer_wins": last.longer_wins,
    }


def test_nothing_measured() -> None:
    assert before_and_after([]) == {}
    assert before_and_after([{"eval_loss": 1.0}]) == {}
