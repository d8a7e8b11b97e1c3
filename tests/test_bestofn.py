from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from palate.bestofn import best_of_kl, expected_best


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_estimate_is_the_mean_over_all_subsets(n: int) -> None:
    rewards = [0.3, -1.0, 2.5, 2.5, 0.0, 7.0]
    subsets = list(itertools.combinations(rewards, n))
    assert expected_best(rewards, n) == pytest.approx(sum(map(max, subsets)) / len(subsets))


def test_the_estimate_is_unbiased() -> None:
    draws = np.random.default_rng(0).normal(size=(20000, 4))
    truth = np.random.default_rng(1).normal(size=(200000, 2)).max(1).mean()
    assert np.mean([expected_best(row.tolist(), 2) for row in draws]) == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("n", [0, 4])
def test_n_must_fit(n: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3"):
        expected_best([1.0, 2.0, 3.0], n)


@pytest.mark.parametrize(("n", "kl"), [(1, 0.0), (2, 0.1931), (4, 0.6363), (16, 1.8351), (64, 3.1745)])
def test_kl_of_best_of_n(n: int, kl: float) -> None:
    assert best_of_kl(n) == pytest.approx(kl, abs=5e-4)


def test_kl_of_best_of_n_by_enumeration() -> None:
    # Uniform base over many distinct rewards: P(best is the i-th of m) = (i^n - (i - 1)^n) / m^n.
    m, n = 20000, 4
    p = [((i / m) ** n - ((i - 1) / m) ** n) for i in range(1, m + 1)]
    assert sum(q * math.log(q * m) for q in p) == pytest.approx(best_of_kl(n), abs=1e-3)
