"""ROUGE-L (Lin 2004) on words of any script, and a set of texts that refuses near-copies.

The package rouge-score reads Latin letters and digits only, so that two equal texts in another script have
nothing in common. The tests compare the values with that package's on English.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence

_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Characters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese (also in half
width), Chinese. Each counts as a word."""

_SPACES = re.compile(r"[\s\u0f0b\u0f0c]+")
"""White space, and the marks between the syllables of Tibetan."""


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: runs of letters, digits and their marks, in any script."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    spaced = (c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in folded)
    return _UNSPACED.sub(lambda match: f" {match[0]} ", "".join(spaced)).split()


def word_count(text: str) -> int:
    """Return the number of words between white space; in scripts without spaces, of characters, and in
    Tibetan of syllables.
    """
    return sum(max(1, len(_UNSPACED.findall(chunk))) for chunk in _SPACES.split(text) if chunk)


def is_unspaced(character: str) -> bool:
    """Return True if the character belongs to a script without spaces between words."""
    return _UNSPACED.match(character) is not None


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    The bits of an integer stand for the words of `one` (Hyyrö 2004), so that a step costs one addition.
    """
    masks: dict[str, int] = {}
    for i, word in enumerate(one):
        masks[word] = masks.get(word, 0) | 1 << i
    row = full = (1 << len(one)) - 1
    for word in other:
        matches = row & masks.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(one) - row.bit_count()


def rouge_l(one: Sequence[str], other: Sequence[str]) -> float:
    """Return ROUGE-L's F1 of two lists of words: 2 LCS / (m + n); 0 if either is empty."""
    if not one or not other:
        return 0.0
    return 2 * common_subsequence(one, other) / (len(one) + len(other))


class Near:
    """Texts among which a near-copy of a new text is found fast.

    Args:
        most: the highest ROUGE-L F1 at which two texts still count as different.
    """

    def __init__(self, most: float = 0.7) -> None:
        self._most = most
        self._texts: list[list[str]] = []
        self._holding: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, own: list[str]) -> None:
        """Add a text, as its words."""
        for word in set(own):
            self._holding[word].append(len(self._texts))
        self._texts.append(own)

    def has_like(self, own: Sequence[str]) -> bool:
        """Return True if the F1 of the words and some added text is above `most`.

        With F1 > t, the two texts share more than t / (2 - t) of the words of each. So the rarest words of
        this text, as many as it may lack and one more, include a shared one, and only texts with one of these
        words are compared.
        """
        shared = max(1, math.floor(len(own) * self._most / (2 - self._most)))
        rarest = sorted(own, key=lambda word: len(self._holding.get(word, ())))[: len(own) - shared + 1]
        candidates = {i for word in set(rarest) for i in self._holding.get(word, ())}
        bag = Counter(own)
        return any(self._is_like(own, bag, self._texts[i]) for i in candidates)

    def _is_like(self, own: Sequence[str], bag: Counter[str], other: Sequence[str]) -> bool:
        bound = self._most * (len(own) + len(other)) / 2
        if min(len(own), len(other)) <= bound or (bag & Counter(other)).total() <= bound:
            return False
        return rouge_l(own, other) > self._most
