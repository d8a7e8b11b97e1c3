"""Questions and verdicts: the records that templates, models and the ledger exchange."""

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
"""Version of questions and answers. It is part of every key, so a change never reuses an old verdict."""

LABELS = (("A", "B"), ("B", "A"), ("X", "Y"), ("Y", "X"), ("P", "Q"), ("Q", "P"))
"""Pairs of labels. Each comparison draws one pair, so no completion can know its label in advance."""

SCORES = tuple(map(str, range(1, 11)))
"""The scale of d-RLAIF (Lee et al. 2023, arXiv:2309.00267)."""

POINTS = tuple(map(str, range(6)))
"""The additive rubric's sums (as in Yuan et al. 2024, arXiv:2401.10020)."""

Status = Literal["ok", "unparsed", "refused", "cut", "no_logprobs", "failed"]
"""The outcome of a question. Only `failed` is a transport error and is asked again."""

CUT = "\n[{} characters are left out here]"
"""Follows a text that is too long to be shown in full."""


@dataclass(frozen=True)
class Question:
    """One question to a judge, about texts in one order.

    Attributes:
        template: turns the question into text.
        prompt: the prompt of the completions.
        texts: the completions, in the order shown: two, or one.
        labels: the possible answers; for a pair, `labels[i]` stands for `texts[i]`.
        criteria: the user's wishes, in plain words.
        sampled: the verdict is read from written text, not from label probabilities.
        repeat: the number of this sample.
        reasoning: the most tokens that the judge may write before its verdict.
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
        """Return prompt and texts in a form that is safe to show, and the number of changed characters."""
        (prompt, changed), parts = legible(in_words(self.prompt)), [legible(text) for text in self.texts]
        return prompt, tuple(text for text, _ in parts), changed + sum(n for _, n in parts)

    @property
    def wants_logprobs(self) -> bool:
        """Return True if the verdict is read from label probabilities."""
        return not self.sampled and self.template.mode != "rubric"

    @property
    def changed(self) -> int:
        """Return the number of control tokens and characters that the judge sees in a harmless spelling."""
        return self._shown[2]

    @cached_property
    def nonce(self) -> str:
        """Return a mark that none of the texts contains: 16 hex digits."""
        prompt, texts, _ = self._shown
        seed = [PROTOCOL, prompt, *texts, self.repeat]
        mark = digest(seed)
        while any(mark in text for text in (prompt, *texts)):
            mark = digest([mark, *seed])
        return mark

    def render(self, longest: int) -> str:
        """Return the question as text, each completion truncated at `longest` characters."""
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
        """Return the number of texts longer than `longest` characters."""
        prompt, texts, _ = self._shown
        return sum(len(text) > longest for text in (prompt, *texts))

    def key(self, identity: Mapping[str, Any]) -> str:
        """Return the key of the verdict: it covers everything that the verdict depends on.

        Args:
            identity: the model and its parameters.
        """
        plain = self.prompt if isinstance(self.prompt, str) else [dict(turn) for turn in self.prompt]
        own = [self.template.hash, self.criteria, plain, self.texts, self.labels]
        return digest([PROTOCOL, dict(identity), own, self.sampled, self.repeat, self.reasoning], size=16)


@dataclass(frozen=True)
class Verdict:
    """The answer to one question, as saved in the ledger.

    Attributes:
        status: the outcome; only `ok` has probabilities.
        probabilities: the probabilities of the question's labels, adding up to 1.
        label_mass: the total probability of the labels, before normalisation.
        argmax_is_label: the likeliest token is one of the labels.
        raw: the judge's text, reasoning included.
        cost: in dollars; 0 for a local model.
    """

    status: Status
    probabilities: tuple[float, ...] | None = None
    label_mass: float | None = None
    argmax_is_label: bool | None = None
    raw: str = ""
    finish: str = ""
    note: str = ""
    """The reason for a missing verdict, for messages."""
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
        """Return True if the verdict has probabilities."""
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
    """The total spending on judging over all starts of a run.

    Attributes:
        verdicts: questions that were sent, each counted once whatever its retries.
        requests: requests, retries included.
        amount: tokens and dollars; a request without an answer counts with its reserve.
        unanswered: requests that may or may not have been billed.
        reused: verdicts from the cache of an earlier run.
    """

    verdicts: int = 0
    requests: int = 0
    amount: Amount = field(default_factory=Amount)
    unanswered: int = 0
    reused: int = 0


def labels_of(prompt: Content, texts: tuple[str, str], repeat: int = 0) -> tuple[str, str]:
    """Return the label pair of a comparison, chosen by a hash of its content.

    Both orders use the same pair, and its first label stands for the text shown first. So a judge that always
    answers the same label, or always the first, gives 0.5 on average over the two orders.
    """
    number = int(digest([in_words(prompt), sorted(texts), repeat]), 16)
    return LABELS[number % len(LABELS)]


def closing(question: Question) -> str:
    """Return the request that follows the judge's reasoning."""
    return f"So, your verdict: reply with one of {', '.join(question.labels)} and nothing else."


def in_words(content: Content) -> str:
    """Return a prompt as one text; the turns of a conversation get their roles as labels."""
    if isinstance(content, str):
        return content
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in content)


def digest(parts: Any, size: int = 8) -> str:
    """Return a hash of JSON-compatible values, the same in every process: `2 * size` hex digits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[:longest] + CUT.format(len(text) - longest)
