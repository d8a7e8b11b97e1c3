"""Statistical rejection sampling optimisation (Liu et al. 2023, arXiv:2309.06657, Algorithm 1).

Preference losses want pairs drawn from the best policy at a KL cost of beta against the starting one,
which cannot be sampled. So draw many candidates from the starting policy, accept each with probability
exp((r - r_max) / beta) until enough are kept, set these against each other at random, and fit the policy
once to the pairs. Variant sft-sample-rank leaves the rejecting out; variant direct has the data's pairs.

Ours: the annotator may be any scorer, whose scores are the rewards and decide the pairs. The paper has a
ranker of pairs, whose rewards are log-odds against one candidate, and each pair is labelled by itself:
`ask: comparisons`. Repeated candidates, ties and identical pairs are dropped and counted; candidates are
shuffled before the sweeps, since the last of them ends when enough are kept; AdamW instead of Adafactor.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, losses, select
from palate.config import MethodConfig
from palate.method import Method, Recipe, Way
from palate.types import Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

LOSSES = {"sigmoid-norm": "dpo", "hinge-norm": "hinge_norm", "hinge": "rso_hinge"}
"""The paper's names for its losses; only the last has no reference."""


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    loss: Literal["sigmoid-norm", "hinge-norm", "hinge"] = "sigmoid-norm"
    """Loss on a pair: that of DPO, a hinge on the same margin, or a hinge without reference."""
    beta: float = Field(0.05, gt=0)
    """Strength of the loss, the paper's gamma: the inverse of the margin that a hinge asks for, in nats."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_k: int = Field(40, ge=0)
    """Draw from the k likeliest tokens only; 0 for all."""


class RSOConfig(Common, loops.OfflineConfig, loops.Batches):
    """Numbers of RSO; all of the method's own default to the paper's."""

    variant: Literal["sft-sample-rank", "rso-sample-rank"] = "rso-sample-rank"
    """Learn from pairs of samples of the starting policy, of samples thinned by rejection, or (`direct`) of
    the data."""
    n: int = Field(64, ge=2)
    """Candidates per prompt that are sampled and scored, to be thinned by rejection."""
    keep: int = Field(8, ge=2)
    """Candidates per prompt that make pairs; in variant sft-sample-rank so many are sampled."""
    sample_beta: float = Field(0.5, ge=0)
    """Strength of rejection, the paper's beta, in units of reward: at 0 the best are kept, the larger it is,
    the less rewards matter."""
    pairing: Literal["first-round", "tournament"] = "first-round"
    """Disjoint pairs at random, or winners and losers of a knock-out tournament."""
    ask: loops.Ask = "scores"
    """The label of a pair comes from the scores that its candidates have, or, as is fit for a judge or
    ranker, from a comparison of the two that the annotator is asked for."""
    tie: float = Field(0.0, ge=0)
    """Rewards that differ by no more than this are a tie, and the pair is dropped."""

    @model_validator(mode="after")
    def _thins(self) -> Self:
        if self.variant == "rso-sample-rank" and self.keep > self.n:
            raise ValueError(
                f"keep is {self.keep}, more than the {self.n} candidates of n; lower it or raise n"
            )
        return self


class RSODirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Numbers of RSO on the pairs of the data: its losses, without its samples."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def rso(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RSOConfig, run: Run) -> None:
    """Train `policy` in place on its own candidates, thinned by rejection."""
    objective = _objective(policy, cfg)
    rng = Random(run.seed("select"))
    rejects = cfg.variant == "rso-sample-rank"
    candidates = loops.draw(policy, prompts, cfg.n if rejects else cfg.keep, cfg.sampling, run)  # y ~ pi_sft
    if rejects or cfg.ask == "scores":
        candidates = candidates.annotated(annotate)  # r
    if rejects:  # y ~ pi_sft exp(r / beta)
        candidates = candidates.thinned(
            lambda group: select.rejection_sample(group, cfg.keep, beta=cfg.sample_beta, rng=rng)
        )
    pairs, dropped = loops.paired(  # (y_w, y_l)
        candidates.groups, annotate, pairing=cfg.pairing, ask=cfg.ask, tie=cfg.tie, rng=rng
    )
    numbers = candidates.numbers(dropped, len(pairs))
    loops.fit_round(policy, pairs, lambda *_: objective, cfg, run, numbers=numbers)


def rso_direct(
    policy: Policy, pairs: Sequence[Pair], cfg: RSODirectConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    objective = _objective(policy, cfg)
    loops.fit(policy, pairs, lambda *_: objective, cfg, run, held_out)


def _objective(policy: Policy, cfg: Common) -> learn.Pairwise:
    loss = losses.PAIR_LOSSES[LOSSES[cfg.loss]]
    return learn.Pairwise(
        loss, cfg.beta, learn.CachedReference(policy.snapshot()) if loss.needs_ref else None
    )


METHOD = Method(
    train=rso,
    config=RSOConfig,
    summary="learns from pairs of its own samples, thinned by their rewards to those of a better policy",
    paper="Liu et al. 2023, arXiv:2309.06657",
    group="online",
    learns_from="prompts",
    others=(Way(rso_direct, RSODirectConfig, "pairs"),),
    recipe=Recipe("human", "start", "once", ("policy", "reference"), ("policy",)),
)
