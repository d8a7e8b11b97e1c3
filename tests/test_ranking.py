from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau, spearmanr

from palate.ranking import Ranked, judge_metrics, kendall, outcome, spearman

ITEMS = [Ranked((0, -1, -2), (5, 4, 4)), Ranked((0, -1, -2), (4, 5, 2)), Ranked((0, -1), (3, 3))]
"""Human ranks 0, 1, 2 with 0 the best, and the judge's scores."""


def test_known_values() -> None:
    found = judge_metrics(ITEMS)
    assert found["pairs"] == 7
    assert found["pairwise_strict"] == pytest.approx(4 / 7)
    assert found["pairwise"] == pytest.approx(5 / 7)
    assert found["ties"] == pytest.approx(2 / 7)
    assert found["unclear"] == 0
    assert found["exact"] == 0  # ties are no order
    assert found["best"] == 0.5
    assert found["kendall"] == pytest.approx((0.816497 + 0.333333) / 2, abs=1e-6)
    assert found["spearman"] == pytest.approx((0.866025 + 0.5) / 2, abs=1e-6)
    assert found["uncorrelated"] == pytest.approx(1 / 3)
    assert found["pairwise_low"] < found["pairwise"] < found["pairwise_high"]


def test_without_the_highest_score_there_is_no_5_best() -> None:
    assert "best" not in judge_metrics([Ranked((1, 0), (4, 3))])
    assert judge_metrics([Ranked((1, 0), (1.0, 0.5))], perfect=1.0)["best"] == 1.0


def test_an_answer_without_a_score() -> None:
    found = judge_metrics([Ranked((2, 1, 0), (5, None, 1))])
    assert found["unclear"] == pytest.approx(2 / 3)
    assert found["pairwise_strict"] == pytest.approx(1 / 3)
    assert found["pairwise"] == pytest.approx(2 / 3)
    assert found["exact"] == 0
    assert found["kendall"] == 1.0  # of the two others


def test_the_gap_leaves_out_close_answers() -> None:
    item = Ranked((0.9, 0.8, 0.1), (1, 2, 0))
    assert judge_metrics([item])["pairwise"] == pytest.approx(2 / 3)
    assert judge_metrics([item], gap=0.2)["pairwise"] == judge_metrics([item], gap=0.2)["exact"] == 1.0
    assert judge_metrics([item], gap=2.0) == {"pairs": 0}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=9))
def test_correlations_are_those_of_scipy(rows: list[tuple[int, int]]) -> None:
    one, other = ([float(row[i]) for row in rows] for i in (0, 1))
    if len(set(one)) > 1 and len(set(other)) > 1:
        assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic)
        assert kendall(one, other) == pytest.approx(kendalltau(one, other).statistic)


@given(st.none() | st.integers(0, 5), st.none() | st.integers(0, 5))
def test_the_outcomes_of_both_sides_add_up_to_one(a: int | None, b: int | None) -> None:
    assert outcome(a, b) + outcome(b, a) == 1.0
