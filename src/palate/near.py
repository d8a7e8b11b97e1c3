"""The word that a mistyped one may have been meant as."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def near(word: str, words: Iterable[str]) -> str | None:
    """Return the one of `words` that is most like `word`, None if none is."""
    return next(iter(difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.65)), None)
