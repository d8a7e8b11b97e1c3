"""The prompts of a round, and a threshold for its rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from palate.data import Stream
from palate.errors import RunError
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
    return min(rewards[max(0, math.ceil(given * len(rewards)) - 1)], below[-1])
