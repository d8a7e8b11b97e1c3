"""Candidates: completions that a method samples and annotates before it learns from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from palate.annotate import Annotator
from palate.config import Sampling
from palate.errors import RunError
from palate.learn import Objective, Policy
from palate.loops.config import Batches
from palate.loops.offline import fit
from palate.loops.pools import groups_of_pool
from palate.loops.records import once
from palate.loops.report import fresh_logps, group_numbers
from palate.loops.texts import from_column
from palate.pool import Pool
from palate.run import Run
from palate.select import Drop, distinct, select_completions
from palate.types import Group, Prompt, Record

R = TypeVar("R", bound=Record)

ADVICE = "use a reward that differs between candidates, a larger --n or a higher --temperature"


@dataclass(frozen=True)
class Candidates:
    """The completions that a policy sampled, and the selection of them to learn from.

    Attributes:
        sampled: all sampled completions.
        distinct: the completions without repetitions; with rewards after annotation.
        groups: the part of `distinct` to learn from.
        dropped: number of dropped completions, by reason.
    """

    sampled: Sequence[Group]
    distinct: Sequence[Group]
    groups: Sequence[Group]
    dropped: Mapping[Drop, int]

    def annotated(self, annotate: Annotator) -> Candidates:
        """Return the candidates with rewards."""
        rewarded = annotate(self.groups)
        return replace(self, distinct=rewarded, groups=rewarded)

    def thinned(self, rule: Callable[[Group], Group]) -> Candidates:
        """Return the candidates that a rule of `palate.select` keeps, and count the others as dropped."""
        kept = select_completions(self.groups, rule)
        return replace(self, groups=kept.groups, dropped=Counter(self.dropped) + Counter(kept.dropped))

    def numbers(self, dropped: Mapping[Drop, int], kept: int) -> dict[str, float]:
        """Return the metrics of samples, candidates and records, which every step logs.

        `objective/*` and `completions/*` describe all annotated completions; `candidates/scores` is the mean
        reward of the kept completions.

        Args:
            dropped: number of groups without a record, by reason.
            kept: number of records.
        """
        numbers = group_numbers(self.distinct, dropped, kept=kept)
        rewards = [r for group in self.groups for r in group.rewards or () if r is not None]
        if rewards:
            numbers["candidates/scores"] = sum(rewards) / len(rewards)
        return {
            **numbers,
            **fresh_logps(self.sampled),
            "candidates/kept": sum(len(group.completions) for group in self.groups),
            "candidates/dropped": sum(self.dropped.values()),
            **{f"candidates/dropped_{reason}": self.dropped.get(reason, 0) for reason in Drop},
        }


def draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    run: Run,
    round_: int = 0,
    *,
    texts: Sequence[str] = (),
    pool: Pool | None = None,
) -> Candidates:
    """Sample n completions of each prompt as candidates, or read them from a pool, without repetitions.

    Args:
        policy, prompts, n, sampling: as in `Snapshot.sample`; repeated rows count once.
        run: source of the seed.
        round_: number of the draw, for a run with several draws.
        texts: columns of the data with further completions of the prompt.
        pool: the source of the first draw.

    Raises:
        ConfigError: the pool lacks a prompt.
        DataError: a prompt is too long to leave room for new tokens, or lacks a text.
    """
    sampled = (
        policy.snapshot().sample(once(prompts), n, sampling, seed=run.seed("sample", round_))
        if pool is None or round_ > 0
        else groups_of_pool(pool, policy, once(prompts), n, run)
    )
    joined = [
        replace(g, completions=(*g.completions, *(from_column(policy, g.prompt, name) for name in texts)))
        for g in sampled
    ]
    kept = select_completions(joined, distinct)
    return Candidates(sampled, kept.groups, kept.groups, kept.dropped)


def fit_round(
    policy: Policy,
    records: Sequence[R],
    objective: Callable[[Sequence[R], int], Objective[R]],
    cfg: Batches,
    run: Run,
    *,
    numbers: Mapping[str, float],
    advice: str = ADVICE,
    round_: int = 0,
) -> None:
    """Fit the records of a round's candidates, with a separate learning-rate schedule.

    Args:
        policy, records, objective, cfg, run: as in `fit`.
        numbers: logged with every step's metrics.
        advice: the remedy for a round without records, as the end of the error message.
        round_: number of the round, from 0.

    Raises:
        RunError: there are no records.
    """
    if not records:
        reasons = [
            f"{int(count)} {name.partition('dropped_')[2].replace('_', ' ')}"
            for name, count in numbers.items()
            if name.startswith(("pairs/dropped_", "candidates/dropped_")) and count
        ]
        mean = numbers.get("objective/scores")
        raise RunError(
            f"round {round_ + 1} gave nothing to learn from: {int(numbers['candidates/kept'])} candidates"
            f"{'' if mean is None else f' with a mean reward of {mean:.3g}'} "
            f"(dropped: {', '.join(reasons) or 'none'}); {advice}"
        )
    policy.optimizer.restart(total_steps=cfg.total_steps(len(records)))
    logged = {"round": round_ + 1, **numbers}
    fit(policy, records, objective, cfg, run, name=f"round {round_}", numbers=logged)
