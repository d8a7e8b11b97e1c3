"""A scorer for answers that stay on the prompt's topic, by their shared words. For English."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from palate.types import Completion, Prompt

ENOUGH = 2
"""Shared content words that give the full reward; more of them add nothing."""

_WORD = re.compile(r"[a-z]+")
_ENDINGS = ("ings", "ing", "edly", "ies", "ied", "es", "ed", "ly", "s")
_STEM = 6

# Words that phrase a question and do not name its topic.
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

    A word counts once, whatever its ending. If the prompt has fewer content words, all of them are needed; if
    it has none, every completion gets 1. It only compares words, so use it together with a main reward, which
    a policy could otherwise earn without answering.
    """

    name: str = "on-topic"

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """One reward per completion."""
        return [score(p.text, c.text) for p, c in zip(prompts, completions, strict=True)]


def score(prompt: str, text: str) -> float:
    """Return the reward of a text as an answer to a prompt."""
    wanted = content_words(prompt)
    if not wanted:
        return 1.0
    return min(1.0, len(wanted & content_words(text)) / min(ENOUGH, len(wanted)))


def content_words(text: str) -> set[str]:
    """Return the stems of the content words of a text."""
    words = _WORD.findall(text.lower().replace("'", ""))
    return {_stem(word) for word in words if len(word) > 2 and word not in _SKIPPED}


def _stem(word: str) -> str:
    ending = next((e for e in _ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    stem = word[: len(word) - len(ending)]
    stem = stem[:-1] if len(stem) > 3 and (stem[-1] == "e" or stem[-1] == stem[-2]) else stem
    return stem[:_STEM]
