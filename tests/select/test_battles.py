from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.select.battles import RIDGE, Results, battle_scores, position_weights

KNOWN: Results = {(0, 1): 1, (1, 0): 1, (0, 2): 1, (2, 0): -1, (1, 2): 1, (2, 1): 1}
"""The first position wins five times, the second once."""


def test_known_battles() -> None:
    weights = position_weights([KNOWN])
    assert weights == pytest.approx((1 / 6, 5 / 6))
    assert battle_scores(KNOWN, 3, weights) == pytest.approx([1.121436, 0, -1.121436], abs=1e-6)


@pytest.mark.parametrize("results", [{(0, 1): 1, (1, 0): 1}, {(0, 1): -1}, {(0, 1): 0}, {}])
def test_if_only_one_position_wins_both_count(results: Results) -> None:
    assert position_weights([results]) == (0.5, 0.5)


def test_a_judge_that_prefers_a_position_gives_ties() -> None:
    results = {(m, n): 1 for m in range(3) for n in range(3) if m != n}
    assert battle_scores(results, 3, position_weights([results])) == pytest.approx([0, 0, 0])


@given(st.dictionaries(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(-1, 1), max_size=20))
def test_scores_are_at_the_minimum(drawn: dict[tuple[int, int], int]) -> None:
    results = {pair: result for pair, result in drawn.items() if pair[0] != pair[1]}
    weights = position_weights([results])
    scores = battle_scores(results, 5, weights)
    slope = [RIDGE * score for score in scores]
    for (m, n), result in results.items():
        if result:
            winner, loser = (m, n) if result == 1 else (n, m)
            missing = weights[result == -1] / (1 + math.exp(scores[winner] - scores[loser]))
            slope[winner] -= missing
            slope[loser] += missing
    assert slope == pytest.approx([0] * 5, abs=1e-8)
    assert sum(scores) == pytest.approx(0, abs=1e-6)
