"""A scorer for answers that keep to what was asked, by the words that both have. For English."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from palate.types import Completion, Prompt

ENOUGH = 2
"""Content words of the prompt from which an answer is on topic; more of them add nothing."""

_WORD = re.compile(r"[a-z]+")
_ENDINGS = ("ings", "ing", "edly", "ies", "ied", "es", "ed", "ly", "s")
_STEM = 6

# Words that say how something is asked, not what is asked about.
_FUNCTION_WORDS = """
about above after again against all also always and any anyone anything are aren because been before being
below best between both but can cannot could couldn describe did didn does doesn doing don done down
during each else ever every explain few for from get gets getting give given gives good got had has have
having help her here hers herself him himself his how however if into its itself just less let like make
makes making many may maybe me might mine more most much must myself name need needs never nor not nothing
now off often one only onto other our ours out over own people please put quite rather really said say
says see shall she should since some someone something still such suggest take takes tell tells than that
the their theirs them then there these they thing things this those though through too two under until
upon use used very want wants was way ways well were what when where whether which while who whom whose
why will with without would write writes yet you your yours yourself
"""
_SKIPPED = frozenset(_FUNCTION_WORDS.split())


@dataclass
class OnTopic:
    """The share of `ENOUGH` content words of the prompt that the completion has, 0 to 1.

    A word counts once, whatever its ending. A prompt with fewer content words asks for all of them; one
    without any is answered by everything. It sees words alone: it is for use beside a reward that says what
    is wanted, which could otherwise be earned without an answer.
    """

    name: str = "on-topic"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """One reward per completion."""
        return [score(p.text, c.text) for p, c in zip(prompts, completions, strict=True)]


def score(prompt: str, text: str) -> float:
    """Return the reward of a text as an answer to a prompt."""
    asked = content_words(prompt)
    if not asked:
        return 1.0
    return min(1.0, len(asked & content_words(text)) / min(ENOUGH, len(asked)))


def content_words(text: str) -> set[str]:
    """Return the stems of the words of a text that say what it is about."""
    words = _WORD.findall(text.lower().replace("'", ""))
    return {_stem(word) for word in words if len(word) > 2 and word not in _SKIPPED}


def _stem(word: str) -> str:
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    stem = word[: len(word) - len(ending)]
    stem = stem[:-1] if len(stem) > 3 and (stem[-1] == "e" or stem[-1] == stem[-2]) else stem
    return stem[:_STEM]
