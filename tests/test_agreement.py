from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import pytest

from palate.agreement import Judged, PairAgreement, cohens_kappa, length_effect, pair_agreement

PAIRS = 4000
Planted = Callable[[Random, int], tuple[float, float]]
"""P(preferred wins) if shown first, and if shown second, given the length difference."""


def judged(planted: Planted, *, longer: float = 0.7) -> PairAgreement:
    """The figures of a planted judge on pairs of which this share has the longer text as the better one."""
    rng = Random(1)
    lengths = [10 if i < longer * PAIRS else -10 for i in range(PAIRS)]
    return pair_agreement([Judged(*planted(rng, by), i, by) for i, by in enumerate(lengths)])


def near(rate: float) -> object:
    """Within four standard errors of a share of the pairs."""
    return pytest.approx(rate, abs=4 * math.sqrt(max(rate * (1 - rate), 0.01) / PAIRS))


def test_always_first() -> None:
    found = judged(lambda rng, by: (0.9, 0.1))
    assert (found.accuracy.rate, found.ties, found.consistency.rate, found.first_share.rate) == (0.5, 1, 0, 1)
    assert (found.longer_share.rate, found.kappa) == (0.5, 0.0)
    assert found.ece == pytest.approx(0.0)
    # Every pair is a tie: the fitted probability is 1/2 everywhere.
    assert found.length_coefficient == pytest.approx(0.0)


def test_longer_wins() -> None:
    found = judged(lambda rng, by: (0.8, 0.8) if by > 0 else (0.2, 0.2))
    assert found.accuracy.rate == pytest.approx(0.7)  # as often as the better text is the longer one
    assert (found.longer_share.rate, found.longer_reference) == (1.0, pytest.approx(0.7))
    assert (found.consistency.rate, found.first_share.rate, found.ties) == (1.0, 0.5, 0.0)
    assert found.kappa == pytest.approx(2 * 0.7 - 1)
    assert found.ece == pytest.approx(0.8 - 0.7)
    assert found.length_coefficient is None  # it decides every pair: no finite estimate


def test_random() -> None:
    found = judged(lambda rng, by: (rng.choice([0.1, 0.9]), rng.choice([0.1, 0.9])))
    assert found.accuracy.rate == near(0.5)
    assert found.ties == near(0.5)  # where the two orders contradict each other
    assert found.consistency.rate == near(0.5)
    assert found.first_share.rate == near(0.5)
    assert found.longer_share.rate == near(0.5)
    assert found.kappa == pytest.approx(0.0, abs=0.05)
    assert found.ece == pytest.approx(
        0.5 * 0.4, abs=0.05
    )  # the consistent half says 0.9 and is right half the time
    assert found.length_coefficient is not None
    assert found.length_standard_error is not None
    assert abs(found.length_coefficient) < 4 * found.length_standard_error


def test_gold_with_noise() -> None:
    def noisy(rng: Random, by: int) -> tuple[float, float]:
        return (0.2, 0.2) if rng.random() < 0.2 else (0.8, 0.8)

    found = judged(noisy)
    assert found.accuracy.rate == near(0.8)
    assert found.accuracy.low < found.accuracy.rate < found.accuracy.high
    assert (found.ties, found.consistency.rate, found.first_share.rate) == (0.0, 1.0, 0.5)
    assert found.kappa == pytest.approx(2 * found.accuracy.rate - 1)
    assert found.ece == pytest.approx(abs(0.8 - found.accuracy.rate))
    assert found.longer_share.rate == near(0.7 * 0.8 + 0.3 * 0.2)
    assert found.length_coefficient is not None
    assert found.length_standard_error is not None
    assert abs(found.length_coefficient) < 4 * found.length_standard_error  # quality alone decides


def test_gold_without_noise() -> None:
    found = judged(lambda rng, by: (1.0, 1.0))
    assert (found.accuracy.rate, found.kappa, found.ece, found.unusable) == (1.0, 1.0, 0.0, 0)
    assert found.length_coefficient is None


def test_a_pair_needs_both_orders() -> None:
    found = pair_agreement([Judged(0.9, None, 0, 1), Judged(None, 0.9, 1, 1), Judged(0.9, 0.7, 2, 1)])
    assert (found.pairs, found.unusable, found.accuracy.rate) == (1, 2, 1.0)


def test_no_pairs_have_no_figures() -> None:
    found = pair_agreement([])
    assert math.isnan(found.accuracy.rate)
    assert math.isnan(found.kappa)
    assert found.length_coefficient is None


def test_several_pairs_of_a_prompt_are_one_cluster() -> None:
    every = [Judged(float(i % 4 > 0), float(i % 4 > 0), i, 1) for i in range(80)]
    of_one = [v._replace(cluster=i // 4 % 2) for i, v in enumerate(every)]
    apart, together = pair_agreement(every).accuracy, pair_agreement(of_one).accuracy
    assert apart.rate == together.rate == 0.75
    assert together.high - together.low > apart.high - apart.low


def test_the_length_coefficient_of_two_lengths_is_a_difference_of_log_odds() -> None:
    counts = {(1, 1.0): 60, (1, 0.0): 40, (-1, 1.0): 30, (-1, 0.0): 70}
    rows = [row for row, n in counts.items() for _ in range(n)]
    slope, error = length_effect([win for _, win in rows], [25 * by for by, _ in rows], range(len(rows)))
    assert slope == pytest.approx((math.log(60 / 40) - math.log(30 / 70)) / 2)
    assert error == pytest.approx(math.sqrt(sum(1 / n for n in counts.values())) / 2)


def test_repeated_rows_of_a_cluster_give_no_smaller_error() -> None:
    wins, lengths = [1, 0, 1, 1, 0, 0, 1, 0], [3, 1, 2, -1, -2, 1, -1, 2]
    _, once = length_effect(wins, lengths, range(8))
    _, thrice = length_effect(wins * 3, lengths * 3, [*range(8)] * 3)
    assert thrice == pytest.approx(once)


@pytest.mark.parametrize(("wins", "kappa"), [([1.0], 1.0), ([0.0], -1.0), ([0.5], 0.0), ([1.0, 0.0], 0.0)])
def test_kappa(wins: list[float], kappa: float) -> None:
    assert cohens_kappa(wins) == kappa


def test_kappa_with_ties_is_that_of_its_table() -> None:
    # Each pair in both orders: the reference says first or second, the judge first, second or tie.
    wins = [1.0] * 5 + [0.0] * 2 + [0.5] * 3
    observed, expected = 5 / 10, 0.5 * 0.35 + 0.5 * 0.35
    assert cohens_kappa(wins) == pytest.approx((observed - expected) / (1 - expected))
