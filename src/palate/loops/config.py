"""Parts of configurations that the loops read. They load neither torch nor numpy."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.config import Config, KLConfig, MethodConfig, RewardConfig, RunConfig, Sampling, Source
from palate.given import is_judge

Ask = Literal["scores", "comparisons"]
"""The question to an annotator: a score for each candidate, once, or the better one of two."""

Pairing = Literal["tournament", "first-round", "drawn", "best-vs-worst"]
"""A knock-out tournament; its first round; as many pairs as candidates, drawn from all; the extremes."""


class Batches(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Pairs (or demonstrations) per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over them."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of epochs."""

    def total_steps(self, records: int) -> int:
        """Optimizer steps for a number of records; the last batch of an epoch runs into the next."""
        return self.steps or max(1, math.ceil(self.epochs * records / self.batch_size))


class PairBatches(Batches):
    """Batches of records from data, of which others may be held out."""

    eval_every: int | None = Field(None, ge=1)
    """Measure on the held-out data every so many steps, besides before and after."""


class OfflineConfig(MethodConfig, RewardConfig, Sampling, KLConfig):
    """Fields of methods that fit a fixed set of records, from data or sampled once.

    Where the records come from data, reward and sampling serve the measurement before and after.
    """


class RoundsConfig(MethodConfig, RewardConfig, Sampling, KLConfig, Batches):
    """Fields of methods in rounds. Epochs and steps are those of one stage of learning.

    Stages follow each other: a finished one cannot be made longer, but more of them may come.
    """

    may_change_bits: ClassVar = RunConfig.may_change_bits - {"steps", "epochs"} | {"rounds"}
    may_grow: ClassVar = frozenset({"rounds"})
    has_threshold: ClassVar[bool] = False
    """The method compares the rewards of all prompts with one threshold."""

    rounds: int = Field(1, ge=1)
    """Rounds of sampling from the policy, selecting and learning."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Prompts of a round, each round continuing where the last one stopped; all if not given."""

    @model_validator(mode="after")
    def _comparable_rewards(self) -> Self:
        what = self.compares_rewards
        ranker = next((spec for spec in self.reward if is_judge(spec)), None)
        if what is not None and ranker is not None:
            raise ValueError(
                f"reward is {ranker!r}, whose numbers are of each prompt's own comparisons, and {what}; "
                "take a reward that scores, such as model:ID"
            )
        if what is not None and self.judge is not None and self.judge_mode == "pairwise":
            raise ValueError(
                f"judge_mode is pairwise, whose numbers are of each prompt's own comparisons, and {what}; "
                "take score or rubric"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """The part of the method that compares rewards of different prompts or rounds, if one does."""
        return "its rewards are held against a threshold" if self.has_threshold else None


class PairRounds(RoundsConfig):
    """Fields of methods whose rounds learn from pairs: the source of a round's pairs."""

    rounds: int = Field(3, ge=1)
    """Rounds of labelling and learning; the first one on `pairs`, where they are given."""
    n: int = Field(4, ge=2)
    """Completions per prompt; the best and the worst make the pair."""
    tie: float = Field(0.0, ge=0)
    """Rewards that differ by no more than this are a tie, and the pair is dropped."""
    label: Literal["annotator", "implicit"] = "annotator"
    """The judge of the completions: the reward, or the policy's own log-ratio to its reference."""
    pairs: Source | None = None
    """Preference pairs from data, read with the split, limit and map of the prompts; the first round learns
    from them instead of samples."""
    mix_pairs: bool = False
    """Learn from `pairs` in the later rounds as well, beside the policy's own."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if self.pairs is None and self.label == "implicit":
            raise ValueError(
                "label is implicit and no pairs are given: before it has learnt anything the policy is its "
                "own reference and prefers nothing; give pairs for the first round"
            )
        if self.pairs is None and self.mix_pairs:
            raise ValueError("mix_pairs is on and no pairs are given; give pairs, or leave it out")
        if self.pairs is not None and self.rounds == 1:
            raise ValueError("rounds is 1 and that round learns from pairs, so nothing is sampled; give more")
        return self
