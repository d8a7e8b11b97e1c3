"""The prompts of a round, and a threshold for its rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from palate.annotate import Annotator
from palate.data import Stream
from palate.errors import ConfigError, RunError
from palate.learn import Policy
from palate.loops.config import RoundsConfig
from palate.loops.records import once
from palate.run import Run
from palate.types import Group, Prompt


def prompts_of_round(prompts: Sequence[Prompt], index: int, cfg: RoundsConfig, run: Run) -> list[Prompt]:
    """Return the prompts of a round (from 0), without repeated rows."""
    drawn = prompts
    if cfg.prompts_per_round is not None:
        drawn = Stream(prompts, seed=run.seed("prompts")).batch(index, cfg.prompts_per_round)
    return once(drawn)


def kept_out(prompts: Sequence[Prompt], count: int, run: Run) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to learn from, and `count` distinct ones that are kept out, drawn by the run's seed.

    Raises:
        ConfigError: nothing would be left to learn from.
    """
    distinct = once(prompts)
    if not count:
        return list(prompts), []
    if count >= len(distinct):
        raise ConfigError(
            f"validation is {count}, but the data have {len(distinct)} prompts, so none would be left to "
            "learn from; lower it"
        )
    unseen = Stream(distinct, seed=run.seed("kept out")).batch(0, count)
    ids = {prompt.id for prompt in unseen}
    return [prompt for prompt in prompts if prompt.id not in ids], unseen


def mean_reward(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RoundsConfig, run: Run
) -> float:
    """Return the mean reward of the policy's answers to held-out prompts; NaN without prompts.

    It is measured once after a step, and logged as `eval_objective/scores`.
    """
    if not prompts:
        return math.nan

    def scores() -> dict[str, float]:
        seed = run.seed("validation", policy.version)
        groups = annotate(policy.snapshot().sample(prompts, 1, cfg.sampling, seed=seed))
        rewards = [r for group in groups for r in group.rewards or () if r is not None]
        return {"eval_objective/scores": sum(rewards) / len(rewards)} if rewards else {}

    return float(run.measure("validation", scores).get("eval_objective/scores", math.nan))


def tell_low_threshold(groups: Sequence[Group], tau: float, where: str, run: Run) -> None:
    """Warn that a threshold which is not above the mean reward improves little or nothing."""
    rewards = [r for group in groups for r in group.rewards or () if r is not None]
    mean = sum(rewards) / len(rewards)
    if tau <= mean:
        run.display.say(
            f"{where}: the first threshold {tau:g} is not above the mean reward {mean:.3f}, so the policy "
            "also imitates completions that are worse than its average; raise --thresholds, or take "
            "--threshold-by quantile"
        )


def threshold(groups: Sequence[Group], given: float, by: Literal["reward", "quantile"], where: str) -> float:
    """Return the reward above which completions are trained on.

    A quantile q keeps at most the fraction 1 - q of all completions, but always all that have the highest
    reward.

    Args:
        groups: groups with rewards.
        given: the reward, or q.
        by: "reward" or "quantile", the meaning of `given`.
        where: the start of an error message.

    Raises:
        RunError: no completion is above the threshold.
    """
    rewards = sorted(r for group in groups for r in group.rewards or () if r is not None)
    if not rewards:
        raise RunError(f"{where}: no completion has a usable reward; check why the reward returns no number")
    if by == "reward":
        if rewards[-1] <= given:
            raise RunError(
                f"{where}: none of {len(rewards)} completions has a reward above the threshold {given:g}, "
                f"the highest is {rewards[-1]:g}; lower --thresholds, or use --threshold-by quantile"
            )
        return given
    below = [r for r in rewards if r < rewards[-1]]
    if not below:
        raise RunError(
            f"{where}: all {len(rewards)} rewards are {rewards[-1]:g}, so none is above any quantile of "
            "them; use a finer reward or raise --temperature"
        )
    # The decimal as it was written: 0.55 of 100 are 55, but the float nearest to 0.55 lies above it.
    return min(rewards[max(0, math.ceil(Fraction(repr(given)) * len(rewards)) - 1)], below[-1])
