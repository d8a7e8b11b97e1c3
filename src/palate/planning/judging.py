"""The annotator's part of a plan: completions to score, questions to a judge, their tokens and price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palate.annotate.judges.build import RUBRIC_TOKENS
from palate.annotate.judges.prices import FREE, Price, price_of
from palate.annotate.judges.records import CUT, POINTS, SCORES, Question, labels_of
from palate.annotate.judges.talk import OVERHEAD
from palate.annotate.judges.template import Template
from palate.config import JudgeConfig
from palate.planning.counts import compares
from palate.spending import Annotations
from palate.types import Prompt

LONGEST_CHARACTER = 4
"""Bytes of the longest character in UTF-8."""

GROWTH = 3
"""The most bytes that the harmless spelling of one byte of a completion has for the judge."""


@dataclass(frozen=True)
class Asked:
    """Work for the annotator, as numbers of texts.

    Attributes:
        scored: completions that a scorer scores.
        questions: questions to a judge; a pair in both orders is two.
    """

    scored: int = 0
    questions: int = 0

    def __add__(self, other: Asked) -> Asked:
        return Asked(self.scored + other.scored, self.questions + other.questions)


def asked(groups: Sequence[Annotations], pairs: int, further: int, cfg: Any) -> Asked:
    """Return the annotator's work.

    Args:
        groups: the groups that it gets.
        pairs: pairs that a judge sees in both orders.
        further: questions of meta-rewarding.
        cfg: the configuration, which says if there is a judge and if it compares.
    """
    scored = sum(group.scored for group in groups)
    if getattr(cfg, "judge", None) is None:
        return Asked(scored)
    own = sum(group.compared for group in groups) if compares(cfg) else scored
    return Asked(questions=own + 2 * pairs + further)


@dataclass(frozen=True)
class Bill:
    """Verdicts, tokens and dollars.

    Attributes:
        verdicts: requests to the judge, without repetitions of failed ones.
        read, written: tokens.
        dollars: at the price per token; 0 for a judge on this machine.
    """

    verdicts: float
    read: float
    written: float
    dollars: float


@dataclass(frozen=True)
class Prices:
    """The judges of a configuration with their prices, and the verdicts on one question.

    Attributes:
        prices: one for each judge that is asked every question.
        expert: the price of a judge that is asked if the first is unsure; None without one.
        repeats, most_repeats: verdicts that a judge gives on one question, as expected and at most.
        written, most_written: tokens that one verdict writes, as expected and at most.
        twice: the judge reads a question twice, since it reasons first.
    """

    prices: tuple[Price, ...]
    expert: Price | None
    repeats: int
    most_repeats: int
    written: float
    most_written: int
    twice: bool

    @property
    def known(self) -> bool:
        """True if every price is known."""
        own = (*self.prices, *(() if self.expert is None else (self.expert,)))
        return all(price.source != "unknown" for price in own)

    def most(self, questions: int, tokens: int) -> Bill:
        """Return the bill if every question has so many tokens and every verdict its greatest length."""
        own = (*self.prices, *(() if self.expert is None else (self.expert,)))
        return _bill(own, questions * self.most_repeats, self._read(tokens), self.most_written)

    def expected(self, questions: int, tokens: float) -> Bill:
        """Return the bill for questions of a mean length; an expert is left out."""
        return _bill(self.prices, questions * self.repeats, self._read(tokens), self.written)

    def _read(self, tokens: float) -> float:
        return 2 * tokens + self.most_written if self.twice else tokens


def _bill(prices: Sequence[Price], verdicts: float, read: float, written: float) -> Bill:
    dollars = sum(verdicts * (read * p.per_million_in + written * p.per_million_out) / 1e6 for p in prices)
    count = verdicts * len(prices)
    return Bill(count, count * read, count * written, dollars)


def prices_of(cfg: JudgeConfig) -> Prices:
    """Return the prices of a configuration's judges; no judge is loaded or asked.

    Raises:
        ConfigError: a limit on the cost is given and a price is unknown.
    """
    rubric, by_text = cfg.judge_mode == "rubric", not cfg.judge_logprobs
    reasoning = cfg.judge_reasoning or (RUBRIC_TOKENS if rubric else 0)
    server = any(spec.startswith("server:") for spec in (cfg.judge or "", *cfg.judge_panel))
    repeats = cfg.judge_samples if rubric or by_text else 1
    # A server without label probabilities is asked once in vain, then its verdicts are sampled.
    most_repeats = repeats + 1 + cfg.judge_samples if server and not rubric else repeats
    text = max(cfg.judge_max_tokens, reasoning)
    written = text if rubric else cfg.judge_max_tokens if by_text else 1 + reasoning
    return Prices(
        tuple(_price(spec, cfg) for spec in (cfg.judge or "", *cfg.judge_panel)),
        None if cfg.judge_expert is None else _price(cfg.judge_expert, cfg),
        repeats,
        most_repeats,
        written,
        text + (reasoning if reasoning and not rubric else 0) if server or rubric or by_text else written,
        twice=bool(reasoning) and not rubric,
    )


def _price(spec: str, cfg: JudgeConfig) -> Price:
    if not spec.startswith("server:"):
        return FREE
    from palate.annotate.judges.server import address  # needs the package openai

    model, url = address(spec.removeprefix("server:"))
    return price_of(model, url, cfg.price_in, cfg.price_out, needed=cfg.max_cost is not None)


class Questions:
    """The questions of a configuration's judge as texts, whose lengths a plan needs.

    Args:
        cfg: the judge's options.
    """

    def __init__(self, cfg: JudgeConfig) -> None:
        self.cfg = cfg
        mode = "pairwise" if compares(cfg) else (cfg.judge_mode or "score")
        self.template = Template.load(mode if mode != "pairwise" else "pairwise", cfg.judge_template)
        self.compares = mode == "pairwise"
        self._labels = POINTS if mode == "rubric" else SCORES
        self._reasoning = cfg.judge_reasoning or (RUBRIC_TOKENS if mode == "rubric" else 0)

    def text(self, prompt: Prompt, texts: Sequence[str]) -> str:
        """Return the question about one or two texts, as the judge reads it."""
        shown = (texts[0], texts[1]) if self.compares else (texts[0],)
        labels = labels_of(prompt.content, (shown[0], shown[-1])) if self.compares else self._labels
        question = Question(
            self.template, prompt.content, shown, labels,
            criteria=self.cfg.criteria or "", reasoning=self._reasoning,
        )  # fmt: skip
        return question.render(self.cfg.judge_max_text)

    def most_tokens(self, prompts: Sequence[Prompt], completion_bytes: int) -> int:
        """Return a bound on the tokens of a question: a token has at least one byte.

        Args:
            prompts: all prompts.
            completion_bytes: the most bytes of a completion.
        """
        empty = max((len(self.text(prompt, ("", "")).encode()) for prompt in prompts), default=0)
        each = min(GROWTH * completion_bytes, LONGEST_CHARACTER * self.cfg.judge_max_text + 2 * len(CUT))
        return empty + (1 + self.compares) * each + OVERHEAD
