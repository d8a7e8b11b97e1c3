"""From what a judge says to a verdict. Whatever is not plainly a verdict is none: nothing here guesses."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from palate.annotate.judges.records import Question, Status
from palate.annotate.judges.reply import Alternative, Reply

MASS = 0.5
"""Labels that have less probability than this together are not what the judge wanted to say."""

NO_LOGPROBS = "the server gave no log-probabilities"

MARKS = " \t\n▁ĠĊ"
"""What tokenizers put in front of a word, or servers write for it."""


@dataclass(frozen=True)
class Reading:
    """A verdict as it was read: its status, the labels' probabilities, and why if there are none."""

    status: Status
    probabilities: tuple[float, ...] | None = None
    label_mass: float | None = None
    argmax_is_label: bool | None = None
    note: str = ""


def read(question: Question, reply: Reply, *, mass: float = MASS) -> Reading:
    """The verdict in a server's reply to a question."""
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
    """The labels' probabilities among the likeliest tokens at the judge's first place.

    Spellings of a label that differ in white space alone count together.

    Args:
        tops: tokens with their log-probabilities.
        labels: that count.
        need_all: a label that is not among the tokens makes it no verdict.
        mass: least probability of all labels together.
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
        # A tokenizer that writes 10 as two tokens: what is said of 1 is said of both.
        return Reading(
            "no_logprobs", None, total, is_label, "the server's tokenizer does not tell 1 and 10 apart"
        )
    if total < mass or total > 1.01:
        said = ", ".join(labels)
        note = f"the labels {said} have the probability {total:.2f} together; it is likeliest to say "
        return Reading("unparsed", None, min(total, 1.0), is_label, f"{note}{likeliest[:20]!r}")
    if need_all and missing:
        return Reading(
            "unparsed", None, total, is_label, f"label {missing[0]} is not among the likeliest tokens"
        )
    return Reading("ok", tuple(p / total for p in spelt.values()), min(total, 1.0), is_label)


def read_text(text: str, finish: str, labels: Sequence[str]) -> Reading:
    """A verdict that is a label and nothing else."""
    if finish == "length":
        return Reading("cut", note="the judge was cut off before it ended; raise --judge-max-tokens")
    if not text.strip():
        return Reading("cut", note="the judge wrote nothing")
    if text.strip() not in labels:
        return Reading("unparsed", note=f"expected one of {', '.join(labels)}, got {text.strip()[:40]!r}")
    return Reading("ok", _certain(text.strip(), labels))


def read_points(text: str, finish: str, labels: Sequence[str]) -> Reading:
    """A verdict that ends with the line `Score: N`, the only such line."""
    if finish == "length":
        return Reading("cut", note="the judge was cut off before it ended; raise --judge-max-tokens")
    lines = [line.strip() for line in text.strip().splitlines()]
    scores = [match for line in lines if (match := re.fullmatch(r"Score:\s*(\d+)", line))]
    if len(scores) != 1 or not lines or scores[0][0] != lines[-1] or scores[0][1] not in labels:
        end = lines[-1][-40:] if lines else ""
        return Reading("unparsed", note=f"expected a last line such as `Score: 3`, got {end!r}")
    return Reading("ok", _certain(scores[0][1], labels))


def _certain(label: str, labels: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(one == label) for one in labels)
