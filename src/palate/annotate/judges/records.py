"""What a judge is asked and what it answers: the records between templates, models and the ledger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from palate.annotate.judges.template import Template
from palate.annotate.judges.text import legible
from palate.types import Content

PROTOCOL = 1
"""Version of questions and answers. It is part of every key, so that a change never reuses an old verdict."""

LABELS = (("A", "B"), ("B", "A"), ("X", "Y"), ("Y", "X"), ("P", "Q"), ("Q", "P"))
"""Pairs of labels, of which each comparison draws one: no completion can know which label it will have."""

SCORES = tuple(map(str, range(1, 11)))
"""The scale of d-RLAIF (Lee et al. 2023, arXiv:2309.00267)."""

POINTS = tuple(map(str, range(6)))
"""The additive rubric's sums (as in Yuan et al. 2024, arXiv:2401.10020)."""

Status = Literal["ok", "unparsed", "refused", "cut", "no_logprobs", "failed"]
"""How a question ended. Only `failed` is a matter of transport and is asked again; the others were paid."""

CUT = "\n[{} characters are left out here]"
"""Behind a text that is too long to be shown whole."""


@dataclass(frozen=True)
class Question:
    """One thing that a judge is asked, about texts in one order.

    Attributes:
        template: what lays the question out.
        prompt: what was asked of the policy.
        texts: the completions, in the order shown: two, or one.
        labels: the answers that count; for a pair, `labels[i]` stands for `texts[i]`.
        criteria: what the user wants, in plain words.
        sampled: the verdict is read from written text, not from label probabilities.
        repeat: number of this sample.
        reasoning: tokens that the judge may write before its verdict.
    """

    template: Template
    prompt: Content
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    criteria: str = ""
    sampled: bool = False
    repeat: int = 0
    reasoning: int = 0

    @cached_property
    def _shown(self) -> tuple[str, tuple[str, ...], int]:
        """Prompt and texts as the judge may read them, and how many characters had to be changed."""
        (prompt, changed), parts = legible(in_words(self.prompt)), [legible(text) for text in self.texts]
        return prompt, tuple(text for text, _ in parts), changed + sum(n for _, n in parts)

    @property
    def wants_logprobs(self) -> bool:
        """Its verdict is read from label probabilities."""
        return not self.sampled and self.template.mode != "rubric"

    @property
    def changed(self) -> int:
        """Control tokens and characters of the texts that the judge sees in a harmless spelling."""
        return self._shown[2]

    @cached_property
    def nonce(self) -> str:
        """A mark around the texts that none of them contains: 16 hex digits."""
        prompt, texts, _ = self._shown
        seed = [PROTOCOL, prompt, *texts, self.repeat]
        mark = digest(seed)
        while any(mark in text for text in (prompt, *texts)):
            mark = digest([mark, *seed])
        return mark

    def render(self, longest: int) -> str:
        """The question as text, each of the texts cut at `longest` characters."""
        prompt, texts, _ = self._shown
        return self.template.render(
            prompt=_cut(prompt, longest),
            texts=[_cut(text, longest) for text in texts],
            labels=self.labels,
            nonce=self.nonce,
            criteria=self.criteria,
            reasoning=self.reasoning > 0,
        )

    def cuts(self, longest: int) -> int:
        """How many of the texts are longer than that."""
        prompt, texts, _ = self._shown
        return sum(len(text) > longest for text in (prompt, *texts))

    def key(self, identity: Mapping[str, Any]) -> str:
        """Key of the verdict: all that it depends on, and nothing of the run that asks.

        Args:
            identity: the model and its parameters.
        """
        plain = self.prompt if isinstance(self.prompt, str) else [dict(turn) for turn in self.prompt]
        own = [self.template.hash, self.criteria, plain, self.texts, self.labels]
        return digest([PROTOCOL, dict(identity), own, self.sampled, self.repeat, self.reasoning], size=16)


@dataclass(frozen=True)
class Verdict:
    """The answer to one question, as it is kept in the ledger.

    Attributes:
        status: how it ended; only `ok` has probabilities.
        probabilities: of the question's labels, adding up to 1.
        label_mass: probability of all labels together, before they were made to add up to 1.
        argmax_is_label: the likeliest token is one of the labels.
        raw: what the judge wrote, reasoning included.
        cost: in dollars; 0 for a model of one's own.
    """

    status: Status
    probabilities: tuple[float, ...] | None = None
    label_mass: float | None = None
    argmax_is_label: bool | None = None
    raw: str = ""
    finish: str = ""
    note: str = ""
    """Why there is no verdict, for people."""
    http_status: int | None = None
    attempts: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    price_source: str = ""
    served_model: str = ""
    fingerprint: str = ""
    latency_ms: int = 0
    changed: int = 0
    cuts: int = 0

    @property
    def usable(self) -> bool:
        """Whether it says anything."""
        return self.status == "ok"


@dataclass(frozen=True)
class Amount:
    """Tokens and dollars, reserved or spent."""

    tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.tokens + other.tokens, self.cost + other.cost)

    def __sub__(self, other: Amount) -> Amount:
        return Amount(self.tokens - other.tokens, self.cost - other.cost)


@dataclass(frozen=True)
class Spent:
    """What judging has taken over the whole life of a run.

    Attributes:
        verdicts: questions that were sent, each counted once however often it was retried.
        requests: requests, retries included.
        amount: tokens and dollars; requests without an answer count with what was reserved for them.
        unanswered: requests of which nobody knows whether they were billed.
        reused: verdicts that the cache of an earlier run gave.
    """

    verdicts: int = 0
    requests: int = 0
    amount: Amount = field(default_factory=Amount)
    unanswered: int = 0
    reused: int = 0


def labels_of(prompt: Content, texts: tuple[str, str], repeat: int = 0) -> tuple[str, str]:
    """The label pair of a comparison, by a hash of its content.

    Both orders have the same pair, of which the first label stands for the text shown first. So a judge that
    always says the same label, or always the first, gives one half on average over the two orders.
    """
    number = int(digest([in_words(prompt), sorted(texts), repeat]), 16)
    return LABELS[number % len(LABELS)]


def closing(question: Question) -> str:
    """What is said after the judge's reasoning."""
    return f"So, your verdict: reply with one of {', '.join(question.labels)} and nothing else."


def in_words(content: Content) -> str:
    """A prompt as one text; the turns of a conversation with their roles."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in content)


def digest(parts: Any, size: int = 8) -> str:
    """A hash of what JSON can write, the same in every process: `2 * size` hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + CUT.format(len(text) - longest)
