from __future__ import annotations

import math

import pytest

from palate.textstats import distinct, repetition


def test_distinct_counts_over_all_texts() -> None:
    assert distinct(["aab", "ab"], 1) == pytest.approx(2 / 5)
    assert distinct(["aab", "ab"], 2) == pytest.approx(2 / 3)
    assert math.isnan(distinct(["a"], 2))


def test_repetition_is_within_a_text() -> None:
    assert repetition(["abcdabcd"]) == pytest.approx(1 / 5)
    assert repetition(["abcd", "abcd"]) == 0
    assert repetition(["aaaaaa", "ab"]) == pytest.approx((2 / 3) / 2)
    assert math.isnan(repetition([]))
