"""Scorers that need no model: sentiment, length, a pattern."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from palate.errors import AnnotatorError
from palate.types import Completion, Prompt


@dataclass
class Rule:
    """A reward that depends on the completion's text alone."""

    name: str
    score: Callable[[str], float]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion."""
        return [self.score(completion.text) for completion in completions]


def length(target: int) -> Rule:
    """Return a rule that gives 0 at `target` words, and 1 less for every `target` words more or fewer."""
    if target < 1:
        raise AnnotatorError(f"length:{target} is not a valid target; expected a number of words above 0")
    return Rule(f"length:{target}", lambda text: -abs(len(text.split()) - target) / target)


def regex(pattern: str) -> Rule:
    """Return a rule that gives 1 if the text matches the pattern anywhere, else 0."""
    if not pattern:
        raise AnnotatorError("regex: has no pattern; expected regex:PATTERN, such as regex:[Ss]orry")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise AnnotatorError(f"regex:{pattern} is not a valid regular expression: {error}") from error
    return Rule(f"regex:{pattern}", lambda text: float(compiled.search(text) is not None))


def sentiment() -> Rule:
    """Return a rule for positive sentiment, -1 to 1: the compound score of VADER (Hutto and Gilbert 2014)."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise AnnotatorError(
            "reward `sentiment` needs the package vaderSentiment: run `pip install 'palate[demo]'`"
        ) from error
    analyzer = SentimentIntensityAnalyzer()
    return Rule("sentiment", lambda text: float(analyzer.polarity_scores(text)["compound"]))
