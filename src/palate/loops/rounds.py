"""What methods in rounds share: the numbers of a round, its prompts, a threshold for its rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.config import MethodConfig, RewardConfig, RunConfig, Sampling
from palate.data import Stream
from palate.errors import RunError
from palate.loops.offline import PairBatches
from palate.loops.records import once
from palate.method import DIRECT
from palate.run import Run
from palate.types import Group, Prompt

MAY_CHANGE = RunConfig.may_change_bits - {"steps", "epochs"} | {"rounds"}
"""Stages follow each other: one that is done cannot be made longer, but more of them may come."""


class RoundsConfig(PairBatches, MethodConfig, RewardConfig, Sampling):
    """What methods in rounds share. Epochs and steps are those of one stage of learning."""

    may_change_bits: ClassVar = MAY_CHANGE
    may_grow: ClassVar = frozenset({"rounds"})
    unoffered: ClassVar = frozenset({"eval_every"})  # what is held out are prompts, for before and after
    has_threshold: ClassVar[bool] = False
    """One for the rewards of all prompts."""

    rounds: int = Field(1, ge=1)
    """How often the policy as it is then is sampled from, and learns from what is selected."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts sampled from in a round, each round going on where the last one stopped; all if not given."""

    @model_validator(mode="after")
    def _comparable_rewards(self) -> Self:
        what = self.compares_rewards
        ranker = next((spec for spec in self.reward if spec.startswith("ranker:")), None)
        if what is not None and ranker is not None:
            raise ValueError(
                f"reward is {ranker!r}, whose numbers are of each prompt's own comparisons, and {what}; "
                "take a reward that scores, such as model:ID"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """What sets rewards of different prompts or rounds against each other, if anything does."""
        held = self.has_threshold and getattr(self, "variant", None) != DIRECT
        return "its rewards are held against a threshold" if held else None


OF_ROUNDS = frozenset({"rounds", "prompts_per_round"})
"""Fields of rounds of sampling."""


def prompts_of_round(prompts: Sequence[Prompt], index: int, cfg: RoundsConfig, run: Run) -> list[Prompt]:
    """What a round, counted from 0, samples from; no row twice."""
    drawn = prompts
    if cfg.prompts_per_round is not None:
        drawn = Stream(prompts, seed=run.seed("prompts")).batch(index, cfg.prompts_per_round)
    return once(drawn)


def threshold(groups: Sequence[Group], given: float, by: Literal["reward", "quantile"], where: str) -> float:
    """The reward above which completions are learnt from.

    With a quantile q, those are the best and at most the share 1 - q of all; more only where more are best.

    Args:
        groups: with rewards.
        given: the reward, or q.
        by: which of the two it is.
        where: begins the message.

    Raises:
        RunError: no completion is above it.
    """
    rewards = sorted(r for group in groups for r in group.rewards or () if r is not None)
    if not rewards:
        raise RunError(f"{where}: no completion has a usable reward; see why the reward gives nothing")
    if by == "reward":
        if rewards[-1] <= given:
            raise RunError(
                f"{where}: none of {len(rewards)} completions has a reward above the threshold {given:g}, "
                f"the highest is {rewards[-1]:g}; lower --thresholds, or take --threshold-by quantile"
            )
        return given
    below = [r for r in rewards if r < rewards[-1]]
    if not below:
        raise RunError(
            f"{where}: all {len(rewards)} rewards are {rewards[-1]:g}, so none is above any quantile of "
            "them; take a finer reward, or raise --temperature"
        )
    # The decimal as it was written: 0.55 of 100 are 55, but the float nearest to 0.55 lies above it.
    return min(rewards[max(0, math.ceil(Fraction(repr(given)) * len(rewards)) - 1)], below[-1])
