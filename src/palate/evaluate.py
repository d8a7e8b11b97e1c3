"""Held-out comparison of two policies under one annotator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from palate.annotate import Annotator
from palate.config import Sampling
from palate.statistics import rate_interval
from palate.types import Group, Prompt

if TYPE_CHECKING:
    from palate.model import Snapshot


@dataclass(frozen=True)
class Evaluation:
    """Two policies on the same prompts. Rates are fractions; KL is in nats per completion.

    Attributes:
        before, after: the annotated completions of each policy, prompt by prompt.
        reward_before, reward_after: mean reward on the compared prompts.
        win_rate: share of prompts on which `after` has the higher reward; a tie counts 0.5.
        win_rate_low, win_rate_high: its 95 % interval.
        kl: estimate of KL(after || before), see `kl_from`.
        length_before, length_after: mean tokens of a completion.
        eos_before, eos_after: share of completions that ended with an end token.
        compared: number of prompts on which both have a usable reward; the others are left out.
    """

    before: tuple[Group, ...]
    after: tuple[Group, ...]
    reward_before: float
    reward_after: float
    win_rate: float
    win_rate_low: float
    win_rate_high: float
    kl: float
    length_before: float
    length_after: float
    eos_before: float
    eos_after: float
    compared: int

    def summary(self) -> dict[str, float]:
        """Return the numbers, for `summary.json`."""
        return {k: v for k, v in vars(self).items() if k not in ("before", "after")}

    def samples(self) -> list[dict[str, Any]]:
        """Return the first completion of each policy for every prompt, side by side, for `samples.jsonl`."""
        return [
            {"prompt": old.prompt.text, **_sample("before", old), **_sample("after", new)}
            for old, new in zip(self.before, self.after, strict=True)
        ]


def compare(
    before: Snapshot,
    after: Snapshot,
    prompts: Sequence[Prompt],
    annotate: Annotator,
    sampling: Sampling,
    *,
    seed: int,
    n: int = 1,
) -> Evaluation:
    """Sample n completions per prompt from both, score them, and estimate how often `after` wins.

    The two draw independently: with shared random numbers, small but even differences would win every time.
    Their completions are scored in the same groups, `before` first, because judges and rankers compare
    completions within a group.
    """
    drawn = zip(
        before.sample(prompts, n, sampling, seed=2 * seed),
        after.sample(prompts, n, sampling, seed=2 * seed + 1),
        strict=True,
    )
    both = annotate([replace(b, completions=b.completions + a.completions) for b, a in drawn])
    old, new = ([_part(group, part) for group in both] for part in (slice(n), slice(n, None)))
    outcomes = [(_win(a, b), a, b) for a, b in zip(new, old, strict=True)]
    wins = {i: win for i, (win, _, _) in enumerate(outcomes) if win is not None}
    rate, low, high, _ = rate_interval(list(wins.values()), [prompts[i].id for i in wins])
    own = new if sampling == sampling.unrestricted else None  # then the KL can use them too
    kl = kl_from(before, after, prompts, sampling, seed=2 * seed + 1, own=own)
    return Evaluation(
        before=tuple(old),
        after=tuple(new),
        reward_before=_mean(_rewards([b for win, _, b in outcomes if win is not None])),
        reward_after=_mean(_rewards([a for win, a, _ in outcomes if win is not None])),
        win_rate=rate,
        win_rate_low=low,
        win_rate_high=high,
        kl=kl,
        length_before=_mean(_lengths(old)),
        length_after=_mean(_lengths(new)),
        eos_before=_mean(_ended(old)),
        eos_after=_mean(_ended(new)),
        compared=len(wins),
    )


def kl_from(
    ref: Snapshot,
    policy: Snapshot,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    seed: int,
    own: Sequence[Group] | None = None,
) -> float:
    """Estimate KL(policy || ref) in nats per completion of at most `sampling.max_new_tokens` tokens.

    It is the mean of log policy(y|x) - log ref(y|x) over y ~ policy. An unbiased estimate needs samples of
    the policy's own distribution, so it uses temperature 1 without top-k, top-p and the like, whatever
    `sampling` says. The mean log-ratio of tempered samples is a different quantity.

    Args:
        ref: the reference of the KL.
        policy: the policy to sample from.
        prompts: one completion is sampled for each.
        sampling: only its limit on new tokens and its stop texts are used.
        seed: the random seed of the samples.
        own: completions already sampled in this way, to use instead.
    """
    drawn = own or policy.sample(prompts, 1, sampling.unrestricted, seed=seed)
    return float((policy.logps(drawn, kept=True).sum() - ref.logps(drawn, kept=True).sum()).mean())


def _part(group: Group, part: slice) -> Group:
    """Return some of a group's completions with their rewards."""
    assert group.rewards is not None
    parts = {name: values[part] for name, values in group.parts.items()}
    return Group(group.prompt, group.completions[part], group.rewards[part], parts)


def _sample(when: str, group: Group) -> dict[str, Any]:
    completion = group.completions[0]
    return {
        when: completion.text,
        f"reward_{when}": None if group.rewards is None else group.rewards[0],
        f"tokens_{when}": len(completion.token_ids),
        f"finish_{when}": completion.finish,
    }


def _win(after: Group, before: Group) -> float | None:
    """Return the mean outcome over the pairs (after's i-th, before's i-th) that both have a reward."""
    assert after.rewards is not None
    assert before.rewards is not None
    outcomes = [
        0.5 * ((a > b) + (a >= b))
        for a, b in zip(after.rewards, before.rewards, strict=True)
        if a is not None and b is not None
    ]
    return sum(outcomes) / len(outcomes) if outcomes else None


def _rewards(groups: Sequence[Group]) -> list[float]:
    return [r for group in groups for r in group.rewards or () if r is not None]


def _lengths(groups: Sequence[Group]) -> list[float]:
    return [float(len(c.token_ids)) for group in groups for c in group.completions]


def _ended(groups: Sequence[Group]) -> list[float]:
    return [float(c.finish != "length") for group in groups for c in group.completions]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
