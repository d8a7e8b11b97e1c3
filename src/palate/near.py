"""Suggestions for mistyped words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str]) -> str | None:
    """Return the item of `words` closest to `word`; None if none is close."""
    return next(iter(difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.65)), None)
