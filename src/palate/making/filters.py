"""Filters of written prompts, after Self-Instruct (Wang et al. 2022, arXiv:2212.10560).

Ours: words of any script count; a text may begin with a letter or digit of any script, not only of ASCII;
letters keep their case; an opening quotation mark and the like may stand before the first word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from enum import StrEnum

from palate.making.rouge import Near, is_unspaced, word_count, words
from palate.types import Prompt

KEYWORDS = ("image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps",
            "draw", "plot", "go to")  # fmt: skip
"""Words of requests that a language model cannot fulfil: it sees and draws nothing."""

OPENING = "¿¡\"'“‘„‚«‹「『《〈"
"""Marks that may stand before the first word of a prompt."""

_PROGRAM = re.compile(r"write a program\b", re.IGNORECASE)


class Left(StrEnum):
    """The reason why a written prompt is left out."""

    TRUNCATED = "truncated"
    """The reply ended at the token limit within the prompt."""
    EMPTY = "empty"
    SHORT = "too short"
    LONG = "too long"
    KEYWORD = "keyword"
    PROGRAM = "write a program"
    START = "begins with a mark"
    """The first character after marks in `OPENING` is neither a letter nor a digit."""
    DUPLICATE = "duplicate"
    """A kept or excluded prompt is the same up to case and white space."""
    SIMILAR = "similar"
    """The ROUGE-L of a kept or excluded prompt is too high."""


class PromptFilter:
    """Keeps prompts that are useful and unlike all prompts kept before.

    Args:
        excluded: prompts that new ones must not resemble, such as the seeds.
        fewest, most: the number of words.
        similarity: the highest ROUGE-L F1 with a kept or excluded prompt.
        keywords: words that exclude a prompt, whatever their case; in scripts without spaces, also within
            longer words.

    Attributes:
        left_out: the number of prompts that were left out, by reason.
    """

    def __init__(
        self,
        excluded: Iterable[str] = (),
        *,
        fewest: int = 4,
        most: int = 150,
        similarity: float = 0.7,
        keywords: Iterable[str] = KEYWORDS,
    ) -> None:
        self.left_out: Counter[Left] = Counter()
        self._fewest, self._most = fewest, most
        given = [_whole(word) for word in keywords]
        self._keywords = re.compile("|".join(given), re.IGNORECASE) if given else None
        self._known: set[str] = set()
        self._near = Near(similarity)
        for text in excluded:
            self._add(text)

    def takes(self, text: str) -> bool:
        """Return True and remember the prompt if it passes; otherwise count the reason."""
        reason = self.fault(text)
        if reason is None:
            self._add(text)
        else:
            self.left_out[reason] += 1
        return reason is None

    def fault(self, text: str) -> Left | None:
        """Return the reason why a prompt is left out; None if it passes."""
        count = word_count(text)
        if not count:
            return Left.EMPTY
        if count < self._fewest:
            return Left.SHORT
        if count > self._most:
            return Left.LONG
        if not text.strip().lstrip(OPENING)[:1].isalnum():
            return Left.START
        if _PROGRAM.match(text.strip()):
            return Left.PROGRAM
        if self._keywords is not None and self._keywords.search(text):
            return Left.KEYWORD
        if normal(text) in self._known:
            return Left.DUPLICATE
        return Left.SIMILAR if self._near.has_like(words(text)) else None

    def _add(self, text: str) -> None:
        self._known.add(normal(text))
        self._near.add(words(text))


def _whole(word: str) -> str:
    """Return the pattern of a keyword: a whole word, as far as its script separates words."""
    start, end = ("" if is_unspaced(character) else r"\w" for character in (word[:1], word[-1:]))
    return (f"(?<!{start})" if start else "") + re.escape(word) + (f"(?!{end})" if end else "")


def subjects(prompt: Prompt) -> list[str]:
    """Return the texts that new prompts must not resemble: a prompt, and the one that a grading is about."""
    about = prompt.columns.get("about")
    return [prompt.text, about] if isinstance(about, str) else [prompt.text]


def normal(text: str) -> str:
    """Return a text without differences of case and white space."""
    return " ".join(text.casefold().split())
