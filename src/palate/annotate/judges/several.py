"""Several judges as one: a panel that takes the mean, and a cascade that asks a second judge when unsure."""

from __future__ import annotations

from collections.abc import Sequence

from palate.annotate.base import Judge
from palate.annotate.judges.judging import PairwiseJudge
from palate.types import Completion, Prompt

Pairs = Sequence[tuple[Completion, Completion]]


class Panel:
    """Asks several judges and returns the mean of their probabilities.

    A question has a verdict if at least half of the members give one. The bench of the first member counts
    the questions on which members prefer different texts.

    Args:
        members: at least two judges, which share one budget.
    """

    def __init__(self, members: Sequence[PairwiseJudge]) -> None:
        self.members = tuple(members)
        self.name = " + ".join(member.name for member in members)

    def __call__(self, prompts: Sequence[Prompt], pairs: Pairs) -> list[float | None]:
        """Return P(first preferred) for each pair as shown, in [0, 1]; None without a usable verdict."""
        votes = zip(*(member(prompts, pairs) for member in self.members), strict=True)
        return [self._mean([p for p in own if p is not None]) for own in votes]

    def _mean(self, votes: Sequence[float]) -> float | None:
        counts = self.members[0].bench.counts
        counts["voted"] += len(votes) > 1
        counts["split"] += any(p > 0.5 for p in votes) and any(p < 0.5 for p in votes)
        if not votes or 2 * len(votes) < len(self.members):
            return None
        return sum(votes) / len(votes)


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
