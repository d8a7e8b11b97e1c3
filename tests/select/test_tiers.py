from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.select import Drop, best_vs_worst, tiered
from palate.types import Completion, Group, Pair, Prompt


def group(scores: list[float | None], lengths: list[int]) -> Group:
    completions = tuple(
        Completion(f"text {i}", tuple(range(100 * i, 100 * i + n))) for i, n in enumerate(lengths)
    )
    return Group(Prompt("q"), completions, tuple(scores))


SCORES: list[float | None] = [4, 3.8, 5, 4.9, 2, 1, 1.3]
LENGTHS = [30, 20, 50, 42, 10, 25, 40]


@pytest.mark.parametrize(("width", "chosen", "rejected"), [(0.0, 2, 5), (0.1, 3, 6), (0.4, 1, 6)])
def test_known_tiers(width: float, chosen: int, rejected: int) -> None:
    own = group(SCORES, LENGTHS)
    pair = tiered(own, width=width)
    assert isinstance(pair, Pair)
    assert pair.chosen is own.completions[chosen]
    assert pair.rejected is own.completions[rejected]
    assert pair.margin == pytest.approx((SCORES[chosen] or 0) - (SCORES[rejected] or 0))


def test_the_shortest_of_the_equally_best() -> None:
    own = group([5, 5, 1, 1], [9, 4, 3, 8])
    pair = tiered(own, width=0.0)
    assert isinstance(pair, Pair)
    assert pair.completions == (own.completions[1], own.completions[3])


@pytest.mark.parametrize(
    ("scores", "drop"),
    [([2, 2, 2], Drop.TIE), ([None, 3, None], Drop.UNUSABLE), ([1, 1.5, 1], Drop.TIE)],
)
def test_no_pair(scores: list[float | None], drop: Drop) -> None:
    assert tiered(group(scores, [1, 2, 3]), width=0.1, tie=0.5) == drop


def test_equal_texts_are_no_pair() -> None:
    same = Completion("a", (1,))
    assert tiered(Group(Prompt("q"), (same, same), (1.0, 5.0)), width=0.0) == Drop.IDENTICAL
    assert tiered(Group(Prompt("q"), (same, same), (1.0, 1.0)), width=0.0) == Drop.IDENTICAL


@pytest.mark.parametrize("width", [-0.1, 0.5])
def test_tiers_do_not_overlap(width: float) -> None:
    with pytest.raises(ValueError, match="so that the tiers do not overlap"):
        tiered(group([1, 2], [1, 2]), width=width)


GROUPS = st.integers(2, 6).flatmap(
    lambda n: st.builds(
        group,
        st.lists(st.none() | st.integers(0, 5).map(float), min_size=n, max_size=n),
        st.lists(st.integers(1, 90), min_size=n, max_size=n),
    )
)


@given(GROUPS, st.sampled_from([0.0, 0.1, 0.4]))
def test_a_pair_lies_in_its_tiers(own: Group, width: float) -> None:
    pair, plain = tiered(own, width=width), best_vs_worst(own)
    assert isinstance(pair, Pair) == isinstance(plain, Pair)
    if isinstance(pair, Pair) and isinstance(plain, Pair):
        assert 0 < (pair.margin or 0) <= (plain.margin or 0)
        assert (pair.margin or 0) >= (1 - 2 * width) * (plain.margin or 0) - 1e-9
