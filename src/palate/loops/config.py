"""Parts of configurations that the loops read. This module loads neither torch nor numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from palate.config import (
    Config,
    KLConfig,
    MethodConfig,
    RewardConfig,
    Rollouts,
    RunConfig,
    Source,
)
from palate.config.base import expand_home
from palate.given import is_judge

Ask = Literal["scores", "comparisons"]
"""The question to an annotator: one score for each candidate, or the better of two candidates."""

Pairing = Literal["tournament", "first-round", "drawn", "best-vs-worst"]
"""Pairs of a knock-out tournament; of its first round; as many random pairs as candidates; the extremes."""


class Batches(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Number of pairs (or demonstrations) per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Number of passes over the training records."""
    steps: int | None = Field(None, ge=1)
    """Number of optimizer steps, instead of epochs."""

    def total_steps(self, records: int) -> int:
        """Return the number of optimizer steps; the last batch of an epoch extends into the next epoch."""
        return self.steps or max(1, math.ceil(self.epochs * records / self.batch_size))


class PairBatches(Batches):
    """Batches of records from data, with optional held-out records."""

    eval_every: int | None = Field(None, ge=1)
    """Steps between measurements on the held-out data; default: only before and after training."""


class FromPool(Config):
    """Pool"""

    pool: Path | None = None
    """Directory of a pool, made by `palate pool`, with the candidates of the first round. Without it, the run
    samples them itself. Model, prompts, sampling options and reward must be those of the pool."""

    @field_validator("pool", mode="before")
    @classmethod
    def _pool_at_home(cls, given: Any) -> Any:
        return expand_home(given)


class OfflineConfig(MethodConfig, RewardConfig, Rollouts, KLConfig):
    """Fields of methods that fit a fixed set of records, from data or sampled once.

    If the records come from data, the options of reward and sampling only affect the measurement before and
    after training.
    """


class RoundsConfig(MethodConfig, RewardConfig, Rollouts, KLConfig, Batches):
    """Fields of methods in rounds. `epochs` and `steps` count for one stage of training.

    Stages follow each other: a finished stage cannot be extended, but further rounds can be added.
    """

    may_change_bits: ClassVar = RunConfig.may_change_bits - {"steps", "epochs"} | {"rounds"}
    may_grow: ClassVar = frozenset({"rounds"})
    has_threshold: ClassVar[bool] = False
    """True if the method compares the rewards of all prompts with one threshold."""

    rounds: int = Field(1, ge=1)
    """Number of sample-and-train rounds."""
    prompts_per_round: int | None = Field(None, ge=1)
    """Number of prompts per round; each round takes the next prompts of the data. Default: all prompts."""

    @model_validator(mode="after")
    def _comparable_rewards(self) -> Self:
        comparison = self.compares_rewards
        ranker = next((spec for spec in self.reward if is_judge(spec)), None)
        if comparison is not None and ranker is not None:
            raise ValueError(
                f"reward is {ranker!r}, whose numbers are comparable within one prompt only, but "
                f"{comparison}; use a reward that scores, such as model:ID"
            )
        if comparison is not None and self.judge is not None and self.judge_mode == "pairwise":
            raise ValueError(
                "judge_mode is pairwise, whose numbers are comparable within one prompt only, but "
                f"{comparison}; use score or rubric"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """The part of the method that compares rewards of different prompts or rounds, or None."""
        return "the method compares all rewards with one threshold" if self.has_threshold else None


class PairRounds(RoundsConfig):
    """Fields of methods whose rounds learn from pairs: the source of a round's pairs."""

    rounds: int = Field(3, ge=1)
    """Number of rounds; with `pairs`, the first round trains on them, the others on labelled samples."""
    n: int = Field(4, ge=2)
    """Number of completions per prompt; the best and the worst form the pair."""
    tie: float = Field(0.0, ge=0)
    """Largest reward difference that counts as a tie; tied pairs are dropped."""
    label: Literal["annotator", "implicit"] = "annotator"
    """Source of the labels: the reward, or the policy's own log-ratio to its reference (`implicit`)."""
    pairs: Source | None = None
    """Data set of preference pairs for the first round, which then samples nothing; the options split, limit
    and map apply to it too."""
    mix_pairs: bool = False
    """Train on `pairs` in the later rounds too, together with the policy's own pairs."""

    @model_validator(mode="after")
    def _pairs_fit(self) -> Self:
        if self.pairs is None and self.label == "implicit":
            raise ValueError(
                "label is implicit and pairs is not set: before training the policy equals its reference, so "
                "it prefers nothing; set pairs for the first round"
            )
        if self.pairs is None and self.mix_pairs:
            raise ValueError("mix_pairs is on, but pairs is not set; set pairs or leave mix_pairs out")
        if self.pairs is not None and self.rounds == 1:
            raise ValueError(
                "rounds is 1 and the first round trains on pairs, so nothing would be sampled; raise rounds"
            )
        return self
