"""Best-of-n: the expected reward and the KL of sampling n completions and keeping the best."""

from __future__ import annotations

import math
from collections.abc import Sequence


def expected_best(rewards: Sequence[float], n: int) -> float:
    """Return an unbiased estimate of the expected best reward of n independent samples of one prompt.

    It is the mean of the maximum over all subsets of size n of the given rewards, without enumeration: the
    i-th smallest of m rewards is the maximum of C(i - 1, n - 1) of the C(m, n) subsets (Nakano et al. 2021,
    arXiv:2112.09332, appendix).

    Args:
        rewards: at least n rewards of independent completions of the prompt.
        n: number of samples to choose from.

    Raises:
        ValueError: there are fewer rewards than n, or n is below 1.
    """
    count = len(rewards)
    if not 1 <= n <= count:
        raise ValueError(f"n is {n}; expected 1 to {count}, the number of rewards")
    subsets = math.comb(count, n)
    return math.fsum(
        reward * (math.comb(i, n - 1) / subsets) for i, reward in enumerate(sorted(rewards)) if i >= n - 1
    )


def best_of_kl(n: int) -> float:
    """Return log n - (n - 1) / n, the KL in nats of best-of-n from its base (Stiennon et al. 2020).

    Exact if no two completions have equal rewards, and an upper bound with ties.
    """
    return math.log(n) - (n - 1) / n
