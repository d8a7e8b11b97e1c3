"""The interface between methods and rewards: an annotator takes groups and returns them with rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from palate.errors import AnnotatorError
from palate.types import Completion, Group, Prompt

MANY = 8
"""Completions in a call from which the lack of any usable reward is an error."""

LARGEST = 3.4e38
"""Largest size of a reward: that of the float32 numbers which it becomes."""

Annotator = Callable[[Sequence[Group]], list[Group]]
"""The function that a method calls. A reward of None means that the completion has no usable reward."""


class Scorer(Protocol):
    """Gives each completion a reward by itself; higher is better."""

    name: str

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """Return one reward per completion; None if a completion has none."""


class Judge(Protocol):
    """Returns the probability that the first of two completions, shown in this order, is preferred.

    The order is part of the question, because a judge may favour a position. A judge answers for the given
    order and corrects nothing; `in_both_orders` asks about each pair in both orders and takes the mean.
    """

    name: str

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) in [0, 1] for each pair as shown; None without a usable verdict."""


def scored(
    *scorers: Scorer,
    weights: Sequence[float] | None = None,
    may_be_silent: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Annotator:
    """Annotate by the weighted sum of scorers.

    A scorer that gives None to all completions of a prompt abstains: the sum for this prompt is that of the
    other scorers, for each of its completions alike. If a scorer gives None, or a number that is not finite
    or beyond float32, to some completions of a prompt only, these get no reward: a partial sum is not
    comparable with the full sums of other completions.

    Args:
        scorers: at least one.
        weights: one per scorer; all 1 if not given.
        may_be_silent: accept a call without any usable reward. It makes a step without pairs, and many such
            steps stop a run.
        say: receives a line, once per scorer, when a scorer first abstains.

    Raises:
        AnnotatorError: a scorer fails, or no completion in a call has a usable reward.
    """
    if not scorers:
        raise AnnotatorError("no reward is given; name at least one, such as --reward sentiment")
    names = _distinct([scorer.name for scorer in scorers])
    chosen = [1.0] * len(scorers) if weights is None else list(weights)
    if len(chosen) != len(scorers):
        raise AnnotatorError(
            f"{len(chosen)} weights were given for {len(scorers)} rewards; expected one each"
        )

    abstained: set[str] = set()

    def annotate(groups: Sequence[Group]) -> list[Group]:
        prompts = [group.prompt for group in groups for _ in group.completions]
        completions = [completion for group in groups for completion in group.completions]
        rewards = {
            name: _one_each(scorer(prompts, completions), name, completions)
            for name, scorer in zip(names, scorers, strict=True)
        }
        parts = {name: [_finite(reward) for reward in given] for name, given in rewards.items()}
        totals: list[float | None] = []
        for group in groups:
            own = slice(len(totals), len(totals) + len(group.completions))
            out = {name for name, given in rewards.items() if all(reward is None for reward in given[own])}
            if own.start < own.stop and out and len(out) < len(names):
                _say_abstained(sorted(out - abstained), group, say)
                abstained.update(out)
            used = [(parts[name][own], w) for name, w in zip(names, chosen, strict=True) if name not in out]
            totals += [
                _weighted([values[i] for values, _ in used], [w for _, w in used])
                for i in range(len(group.completions))
            ]
        if not may_be_silent:
            _require_some(totals, groups, " + ".join(parts))
        return _regroup(groups, totals, parts if len(parts) > 1 else {})

    return annotate


def judged(judge: Judge) -> Annotator:
    """Annotate by the mean probability of winning against the group's other completions, in both orders.

    With two completions the rewards are p and 1 - p, so ties and best-against-worst mean the same for judges
    and scorers. A pair with a verdict in only one order is not used; a completion without any usable verdict
    gets no reward.
    """

    def annotate(groups: Sequence[Group]) -> list[Group]:
        matches = [
            (g, i, j)
            for g, group in enumerate(groups)
            for i in range(len(group.completions))
            for j in range(i + 1, len(group.completions))
        ]
        verdicts = in_both_orders(
            judge,
            [groups[g].prompt for g, _, _ in matches],
            [(groups[g].completions[i], groups[g].completions[j]) for g, i, j in matches],
        )
        wins: dict[tuple[int, int], list[float]] = {}
        for (g, i, j), p in zip(matches, verdicts, strict=True):
            if p is not None:
                wins.setdefault((g, i), []).append(p)
                wins.setdefault((g, j), []).append(1.0 - p)
        rewards = [
            sum(wins[g, i]) / len(wins[g, i]) if (g, i) in wins else None
            for g, group in enumerate(groups)
            for i in range(len(group.completions))
        ]
        return _regroup(groups, rewards, {})

    return annotate


def in_both_orders(
    judge: Judge, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
) -> list[float | None]:
    """Return P(first preferred) for each pair, as the mean over both orders.

    ½ (P(a | a, b) + 1 - P(b | b, a)), as in RLAIF (Lee et al. 2023, arXiv:2309.00267): a judge that always
    favours the same position gives 0.5 to every pair. The result is None if one of the two is missing or not
    a probability.

    Raises:
        AnnotatorError: the number of verdicts differs from the number of questions.
    """
    swapped = [(second, first) for first, second in pairs]
    verdicts = judge([*prompts, *prompts], [*pairs, *swapped])
    if len(verdicts) != 2 * len(pairs):
        raise AnnotatorError(
            f"judge {judge.name} gave {len(verdicts)} verdicts for {2 * len(pairs)} pairs; expected one each"
        )
    return [
        (p + 1.0 - q) / 2 if p is not None and q is not None and 0.0 <= p <= 1.0 and 0.0 <= q <= 1.0 else None
        for p, q in zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)
    ]


def penalised(annotate: Annotator, *, missing_eos: float) -> Annotator:
    """Subtract `missing_eos` from the reward of every truncated completion."""
    if missing_eos == 0.0:
        return annotate

    def wrapped(groups: Sequence[Group]) -> list[Group]:
        annotated = []
        for group in annotate(groups):
            assert group.rewards is not None
            rewards = tuple(
                reward if reward is None or completion.finish != "length" else reward - missing_eos
                for reward, completion in zip(group.rewards, group.completions, strict=True)
            )
            annotated.append(replace(group, rewards=rewards))
        return annotated

    return wrapped


def _distinct(names: Sequence[str]) -> list[str]:
    """Return the names, repeated ones with a number appended: two lambdas are two rewards."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return [f"{name} ({n})" if n > 1 else name for name, n in zip(names, counts, strict=True)]


def _one_each(
    rewards: Sequence[float | None], name: str, completions: Sequence[Completion]
) -> Sequence[float | None]:
    if len(rewards) != len(completions):
        raise AnnotatorError(
            f"reward {name} gave {len(rewards)} rewards for {len(completions)} completions; expected one each"
        )
    return rewards


def _finite(reward: float | None) -> float | None:
    # Rewards become float32 numbers, and statistics square them; NaN fails the comparison too.
    return None if reward is None or not abs(reward) <= LARGEST else float(reward)


def _say_abstained(names: Sequence[str], group: Group, say: Callable[[str], None]) -> None:
    for name in names:
        say(
            f"reward {name} gave None to all completions of {group.prompt.text[:60]!r} {group.prompt.where}: "
            "the sum for such a prompt is that of the other rewards"
        )


def _weighted(values: Sequence[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted sum; None if there is nothing to sum or a value is missing."""
    total = 0.0
    for value, weight in zip(values, weights, strict=True):
        if value is None:
            return None
        total += weight * value
    return _finite(total) if values else None


def _require_some(rewards: Sequence[float | None], groups: Sequence[Group], name: str) -> None:
    # A few completions may all be unusable by chance; with more, the annotator is at fault.
    if len(rewards) >= MANY and all(reward is None for reward in rewards):
        raise AnnotatorError(
            f"{name} gave no usable reward for any of {len(rewards)} completions "
            f"(first prompt: {groups[0].prompt.text[:80]!r})"
        )


def _regroup(
    groups: Sequence[Group], rewards: Sequence[float | None], parts: dict[str, list[float | None]]
) -> list[Group]:
    results, start = [], 0
    for group in groups:
        end = start + len(group.completions)
        own = {name: tuple(values[start:end]) for name, values in parts.items()}
        annotated = group.annotated(tuple(rewards[start:end]))
        results.append(replace(annotated, parts={**group.parts, **own}))
        start = end
    return results
