"""Judges over a desk: a pairwise judge, and scorers that ask for a number or for points."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from palate.annotate.judges.desk import Desk
from palate.annotate.judges.records import POINTS, SCORES, Amount, Question, Verdict, labels_of
from palate.annotate.judges.template import Template
from palate.types import Completion, Prompt


class Bench:
    """A desk with a template, shared by the judges below, and the counts for the metrics.

    Args:
        desk: answers the questions.
        template: turns questions into text.
        criteria: the user's wishes, in plain words.
        samples: verdicts to sample if none can be read from log-probabilities.
        reasoning: tokens that the judge may write before its verdict.
        logprobs: read log-probabilities if the judge gives them; otherwise all verdicts are sampled.
    """

    def __init__(
        self,
        desk: Desk,
        template: Template,
        *,
        criteria: str = "",
        samples: int = 4,
        reasoning: int = 0,
        logprobs: bool = True,
    ) -> None:
        self.desk, self.template, self.samples, self.logprobs = desk, template, samples, logprobs
        self._criteria, self._reasoning = criteria, reasoning
        self.counts: Counter[str] = Counter()

    def question(self, prompt: Prompt, texts: tuple[str, ...], labels: tuple[str, ...]) -> Question:
        """Return the question about texts in this order."""
        return Question(
            self.template, prompt.content, texts, labels, criteria=self._criteria, reasoning=self._reasoning
        )

    def distributions(self, questions: Sequence[Question]) -> list[tuple[float, ...] | None]:
        """Return the probabilities of each question's labels; None without a usable verdict.

        If the judge gives no log-probabilities, they are the shares of its sampled verdicts, of which at
        least half must be usable.
        """
        if not self.logprobs:
            shares = self.shares(questions)
            self.count(shares)
            return shares
        verdicts = self.desk.verdicts(questions)
        by_text = [
            i for i, verdict in enumerate(verdicts) if verdict is None or verdict.status == "no_logprobs"
        ]
        drawn = dict(zip(by_text, self.shares([questions[i] for i in by_text]), strict=True))
        shares = [None if verdict is None else verdict.probabilities for verdict in verdicts]
        for i, share in drawn.items():
            shares[i] = share
        self.count(shares)
        return shares

    def shares(self, questions: Sequence[Question]) -> list[tuple[float, ...] | None]:
        """Return the mean of `samples` verdicts on each question; None if fewer than half are usable."""
        samples = [self.sampled(question, i) for question in questions for i in range(self.samples)]
        drawn, n = self.desk.verdicts(samples), self.samples
        return [_mean_of(drawn[i * n : (i + 1) * n]) for i in range(len(questions))]

    def sampled(self, question: Question, repeat: int) -> Question:
        """Return a sample of the question, with its own labels; the verdict on it is read from text."""
        labels = question.labels
        if question.template.mode == "pairwise":
            labels = labels_of(question.prompt, (question.texts[0], question.texts[1]), repeat)
        return replace(question, labels=labels, sampled=True, repeat=repeat)

    def count(self, shares: Sequence[tuple[float, ...] | None]) -> None:
        """Count the questions, and those without a usable verdict."""
        self.counts["asked"] += len(shares)
        self.counts["unusable"] += sum(share is None for share in shares)

    def metrics(self) -> dict[str, float]:
        """Return the counts since the last call, and the spending since the run began."""
        return metrics_of([self])

    def amounts(self, questions: Sequence[Question]) -> list[tuple[int, Amount]]:
        """Return the number of saved verdicts on each question, samples included, and their cost."""
        identity, n = self.desk.model.identity, self.samples
        every = [[q, *(self.sampled(q, repeat) for repeat in range(n))] for q in questions]
        keys = [[question.key(identity) for question in own] for own in every]
        known = self.desk.ledger.known([key for own in keys for key in own])
        saved = [[known[key] for key in own if key in known] for own in keys]
        return [
            (
                len(own),
                Amount(sum(v.prompt_tokens + v.completion_tokens for v in own), sum(v.cost for v in own)),
            )
            for own in saved
        ]


def metrics_of(benches: Sequence[Bench]) -> dict[str, float]:
    """Return the counts of judges since the last call, and their total spending since the run began.

    Args:
        benches: the benches of all judges, which share one budget.
    """
    counts: Counter[str] = Counter()
    for bench in benches:
        # Another thread may be counting (`palate.annotate.early`), so the counter is replaced, not emptied.
        taken, bench.counts = bench.counts, Counter()
        counts.update(dict(taken))
    budget = benches[0].desk.budget
    values: dict[str, float] = {
        "judge/verdicts": budget.verdicts,
        "judge/tokens": budget.spent.tokens,
        "judge/cost": round(budget.spent.cost, 6),
    }
    for name, (part, whole) in _SHARES.items():
        if counts[whole]:
            values[name] = counts[part] / counts[whole]
    return values


_SHARES = {
    "judge/unusable": ("unusable", "asked"),
    "judge/orders_disagree": ("disagree", "pairs"),
    "judge/members_disagree": ("split", "voted"),
    "judge/expert_asked": ("unsure", "first"),
}
"""Metrics that are shares: the count, and the count of which it is a part."""


class PairwiseJudge:
    """Returns the probability that the text shown first is better, from the probabilities of two labels.

    Lee et al. 2023 (RLAIF, arXiv:2309.00267) and Guo et al. 2024 (OAIF, arXiv:2402.04792) average two such
    answers, one in each order. This judge answers for the given order; `judged` asks in both orders.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.name = bench, bench.desk.model.name

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) for each pair as shown, in [0, 1]; None without a usable verdict."""
        questions = []
        for prompt, (first, second) in zip(prompts, pairs, strict=True):
            texts = (first.text, second.text)
            questions.append(self.bench.question(prompt, texts, labels_of(prompt.content, texts)))
        chances = [None if share is None else share[0] for share in self.bench.distributions(questions)]
        self._count_orders(questions, chances)
        return chances

    def _count_orders(self, questions: Sequence[Question], chances: Sequence[float | None]) -> None:
        """Count pairs that were asked in both orders, and those in which the same position won both times."""
        known = {
            (str(q.prompt), q.texts): p for q, p in zip(questions, chances, strict=True) if p is not None
        }
        for (prompt, (first, second)), p in known.items():
            other = known.get((prompt, (second, first)))
            if other is not None and first < second:
                self.bench.counts["pairs"] += 1
                self.bench.counts["disagree"] += (p - 0.5) * (other - 0.5) > 0


class ScoreJudge:
    """Scores a completion by the expectation of a number from 1 to 10, rescaled to [-1, 1].

    d-RLAIF (Lee et al. 2023, arXiv:2309.00267): the probabilities of the ten numbers are normalised to add up
    to 1.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.name = bench, bench.desk.model.name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward in [-1, 1] per completion; None without a usable verdict."""
        questions = [
            self.bench.question(prompt, (completion.text,), SCORES)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [
            None if share is None else (_mean(share, SCORES) - 5.5) / 4.5
            for share in self.bench.distributions(questions)
        ]


class RubricJudge:
    """Scores a completion by additive points from 0 to 5, averaged over several gradings (the method of
    Self-Rewarding, Yuan et al. 2024, arXiv:2401.10020; the rubric's words are our own).
    """

    def __init__(self, bench: Bench) -> None:
        self.bench, self.name = bench, bench.desk.model.name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward in [0, 5] per completion; None if fewer than half of the gradings are usable."""
        questions = [
            self.bench.question(prompt, (completion.text,), POINTS)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        shares = self.bench.shares(questions)
        self.bench.count(shares)
        return [None if share is None else _mean(share, POINTS) for share in shares]


JUDGES: Mapping[str, type[PairwiseJudge | ScoreJudge | RubricJudge]] = {
    "pairwise": PairwiseJudge,
    "score": ScoreJudge,
    "rubric": RubricJudge,
}


def _mean_of(verdicts: Sequence[Verdict | None]) -> tuple[float, ...] | None:
    """Return the mean probabilities of the usable verdicts; None if fewer than half are usable."""
    usable = [v.probabilities for v in verdicts if v is not None and v.probabilities is not None]
    if not usable or 2 * len(usable) < len(verdicts):
        return None
    return tuple(sum(column) / len(usable) for column in zip(*usable, strict=True))


def _mean(share: Sequence[float], labels: Sequence[str]) -> float:
    """Return the mean label, rounded: gradings with the same sum, such as 4, 4, 4 and 3, 4, 5, are a tie."""
    return round(math.fsum(p * int(label) for p, label in zip(share, labels, strict=True)), 9)
