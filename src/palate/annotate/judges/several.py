"""Several judges as one: panels that take the mean, and a cascade that asks a second judge when unsure."""

from __future__ import annotations

from collections.abc import Sequence

from palate.annotate.base import Judge, Scorer
from palate.annotate.judges.judging import PairwiseJudge
from palate.types import Completion, Prompt

Pairs = Sequence[tuple[Completion, Completion]]


class Panel:
    """Asks several judges and returns the mean of their probabilities.

    A question has a verdict if at least half of the members give one. If a pair is asked about in both
    orders, a member's verdict counts only if it has one in each order: otherwise its position bias would not
    cancel in the mean of the orders. The bench of the first member counts the questions on which members
    prefer different texts.

    Args:
        members: at least two judges, which share one budget.
    """

    def __init__(self, members: Sequence[PairwiseJudge]) -> None:
        self.members = tuple(members)
        self.name = " + ".join(member.name for member in members)

    def __call__(self, prompts: Sequence[Prompt], pairs: Pairs) -> list[float | None]:
        """Return P(first preferred) for each pair as shown, in [0, 1]; None without a usable verdict."""
        whole = [_in_both_orders_or_none(prompts, pairs, member(prompts, pairs)) for member in self.members]
        votes = list(zip(*whole, strict=True))
        for own in votes:
            self._count([p for p in own if p is not None])
        return [_mean_of_half(own) for own in votes]

    def _count(self, votes: Sequence[float]) -> None:
        counts = self.members[0].bench.counts
        counts["voted"] += len(votes) > 1
        counts["split"] += any(p > 0.5 for p in votes) and any(p < 0.5 for p in votes)


class ScorePanel:
    """Asks several scorers on one scale and returns the mean of their usable scores.

    A completion has a score if at least half of the members give one.

    Args:
        members: at least two scorers.
    """

    def __init__(self, members: Sequence[Scorer]) -> None:
        self.members = tuple(members)
        self.name = " + ".join(member.name for member in members)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion; None if fewer than half of the members give one."""
        scores = zip(*(member(prompts, completions) for member in self.members), strict=True)
        return [_mean_of_half(own) for own in scores]


class Cascade:
    """Asks a second judge, the expert, about the pairs on which the first judge is unsure.

    The first judge is unsure about a pair if the mean of its verdicts in both orders is closer to 1/2 than
    `unsure`, or if one of them is missing. A pair that is asked in one order only counts by this order. The
    bench of the expert counts the questions, and those that it is asked.

    Args:
        first: the cheap judge.
        expert: the judge for the rest. Its verdict replaces the first judge's, also if it has none.
        unsure: distance of P from 1/2 below which the expert is asked.
    """

    def __init__(self, first: Judge, expert: PairwiseJudge, *, unsure: float) -> None:
        self.first, self.expert, self.unsure = first, expert, unsure
        self.name = f"{first.name}, if unsure {expert.name}"

    def __call__(self, prompts: Sequence[Prompt], pairs: Pairs) -> list[float | None]:
        """Return P(first preferred) for each pair as shown, in [0, 1]; None without a usable verdict."""
        verdicts = list(self.first(prompts, pairs))
        numbers: dict[tuple[str, tuple[str, ...]], list[int]] = {}
        for i, (prompt, two) in enumerate(zip(prompts, pairs, strict=True)):
            key = (prompt.id, tuple(sorted(completion.text for completion in two)))
            numbers.setdefault(key, []).append(i)
        unsure = []
        for own in numbers.values():
            # P(the text that is shown first in the first of these questions), from each order.
            start = pairs[own[0]][0].text
            votes = [_of(verdicts[i], swapped=pairs[i][0].text != start) for i in own]
            if None in votes or abs(sum(p for p in votes if p is not None) / len(votes) - 0.5) < self.unsure:
                unsure += own
        counts = self.expert.bench.counts
        counts["first"] += len(pairs)
        counts["unsure"] += len(unsure)
        unsure.sort()
        better = self.expert([prompts[i] for i in unsure], [pairs[i] for i in unsure]) if unsure else []
        for i, p in zip(unsure, better, strict=True):
            verdicts[i] = p
        return verdicts


def _of(p: float | None, *, swapped: bool) -> float | None:
    return 1.0 - p if swapped and p is not None else p


def _mean_of_half(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if these are fewer than half."""
    usable = [value for value in values if value is not None]
    return sum(usable) / len(usable) if usable and 2 * len(usable) >= len(values) else None


def _in_both_orders_or_none(
    prompts: Sequence[Prompt], pairs: Pairs, verdicts: Sequence[float | None]
) -> list[float | None]:
    """Return the verdicts; None for each whose pair has no verdict in the other order, if it is asked so."""
    keys = [(prompt.id, a.text, b.text) for prompt, (a, b) in zip(prompts, pairs, strict=True)]
    missing = {key for key, p in zip(keys, verdicts, strict=True) if p is None}
    return [
        None if (prompt, second, first) in missing else p
        for (prompt, first, second), p in zip(keys, verdicts, strict=True)
    ]
