"""Read verdicts from a judge's replies. A reply that is not clearly a verdict counts as none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from palate.annotate.judges.records import Question, Status
from palate.annotate.judges.reply import Alternative, Reply

MASS = 0.5
"""The lowest total probability of the labels for a usable verdict."""

NO_LOGPROBS = "the server gave no log-probabilities"

MARKS = " \t\n▁ĠĊ"
"""Characters that tokenizers put in front of a word, or that servers write for them."""


_SCORE_LINE = re.compile(
    r"\W*score\W*[:：]"
    r"|\W*(?:\w+\s+){0,3}scores?\W*(?:\([^()]*\)\W*)?[:：=]\W*\d+(?:\s*(?:/|of|out of)\s*\d+)?\W*$",
    re.IGNORECASE,
)
"""A line that begins with `Score:`, or that only gives a score, such as `Total score: 4` and
`Score (out of 5): 4`; only the plain spelling is a verdict."""


@dataclass(frozen=True)
class Reading:
    """A verdict as read: its status, the labels' probabilities, and the reason if there are none."""

    status: Status
    probabilities: tuple[float, ...] | None = None
    label_mass: float | None = None
    argmax_is_label: bool | None = None
    note: str = ""


def read(question: Question, reply: Reply, *, mass: float = MASS) -> Reading:
    """Return the verdict in a server's reply to a question."""
    if reply.refused:
        return Reading("refused", note="the judge declined to answer")
    if question.template.mode == "rubric":
        return read_points(reply.text, reply.finish, question.labels)
    if question.sampled:
        return read_text(reply.text, reply.finish, question.labels)
    if not reply.tops:
        return Reading("no_logprobs", note=NO_LOGPROBS)
    return read_tops(reply.tops, question.labels, need_all=question.template.mode == "pairwise", mass=mass)


def read_tops(
    tops: Sequence[Alternative], labels: Sequence[str], *, need_all: bool, mass: float = MASS
) -> Reading:
    """Return the labels' probabilities among the likeliest first tokens of the judge.

    Spellings of a label that differ only in white space count together.

    Args:
        tops: tokens with their log-probabilities.
        labels: the possible answers.
        need_all: all labels must be among the tokens for a verdict.
        mass: the lowest total probability of the labels.
    """
    if any(math.isnan(top.logprob) or top.logprob > 1e-3 for top in tops):
        return Reading("unparsed", note="the log-probabilities are not finite or above 0")
    spelt = dict.fromkeys(labels, 0.0)
    for top in tops:
        if top.token.strip(MARKS) in spelt:
            spelt[top.token.strip(MARKS)] += math.exp(top.logprob)
    total = sum(spelt.values())
    likeliest = max(tops, key=lambda top: top.logprob).token.strip(MARKS)
    is_label = likeliest in spelt
    missing = [label for label, p in spelt.items() if p == 0.0]
    if "10" in missing and "1" in spelt and spelt["1"] > 0.02 * total:
        # If the tokenizer writes 10 as two tokens, the probability of 1 includes that of 10.
        return Reading(
            "no_logprobs",
            None,
            total,
            is_label,
            "the server's tokenizer does not distinguish 1 and 10 by their first token",
        )
    if total < mass or total > 1.01:
        said = ", ".join(labels)
        note = f"the labels {said} have the probability {total:.2f} together; the likeliest token is "
        return Reading("unparsed", None, min(total, 1.0), is_label, f"{note}{likeliest[:20]!r}")
    if need_all and missing:
        return Reading(
            "unparsed", None, total, is_label, f"label {missing[0]} is not among the likeliest tokens"
        )
    return Reading("ok", tuple(p / total for p in spelt.values()), min(total, 1.0), is_label)


def read_text(text: str, finish: str, labels: Sequence[str]) -> Reading:
    """Read a verdict that is a label and nothing else."""
    if finish == "length":
        return Reading("cut", note="the judge's answer was truncated; raise --judge-max-tokens")
    if not text.strip():
        return Reading("cut", note="the judge wrote nothing")
    if text.strip() not in labels:
        return Reading("unparsed", note=f"expected one of {', '.join(labels)}, got {text.strip()[:40]!r}")
    return Reading("ok", _certain(text.strip(), labels))


def read_points(text: str, finish: str, labels: Sequence[str]) -> Reading:
    """Read a verdict that ends with the line `Score: N`, the only line that gives a score.

    A score within a sentence is part of the explanation. Two lines of scores, a score that is not a label,
    and words after the score leave it open which score is meant; such a text counts as unparsed.
    """
    if finish == "length":
        return Reading("cut", note="the judge's answer was truncated; raise --judge-reasoning")
    lines = [line.strip() for line in text.strip().splitlines()]
    scores = [line for line in lines if _SCORE_LINE.match(line)]
    final = re.fullmatch(r"Score:\s*(\d+)", lines[-1]) if lines else None
    if final is None or len(scores) != 1 or final[1] not in labels:
        end = lines[-1][-40:] if lines else ""
        return Reading("unparsed", note=f"expected one last line such as `Score: 3`, got {end!r}")
    return Reading("ok", _certain(final[1], labels))


def _certain(label: str, labels: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(one == label) for one in labels)
