"""Statistics of sampled texts: variety and repetition."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

REPEATED = 4
"""Length of the n-grams that `repetition` counts."""


def distinct(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of texts (Li et al. 2016, arXiv:1510.03055).

    It falls with the amount of text, so compare equal numbers of texts of similar length. NaN without
    n-grams.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(texts: Sequence[Sequence[Hashable]]) -> float:
    """Return the mean share of a text's 4-grams that appeared earlier in the same text; NaN without texts.

    A text without a 4-gram counts as 0.
    """
    shares = []
    for text in texts:
        grams = _grams(text, REPEATED)
        shares.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return math.fsum(shares) / len(shares) if shares else math.nan


def _grams(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
