"""Statistical rejection sampling optimisation (Liu et al. 2023, arXiv:2309.06657, Algorithm 1).

Preference losses should train on pairs from the optimal policy under a KL penalty of strength beta, which
cannot be sampled directly. So RSO samples many candidates from the starting policy, accepts each with
probability exp((r - r_max) / beta) until enough are kept, pairs them at random, and fits the policy once to
the pairs. Variant sft-sample-rank skips the rejection; variant direct learns from the pairs of the data.

Ours: the annotator can be any scorer; its scores are the rewards and decide the pairs. The paper uses a
pairwise ranker: rewards are log-odds against one candidate, and each pair is labelled by its own comparison,
as with `ask: comparisons`. Repeated candidates, ties and identical pairs are dropped and counted; candidates
are shuffled before the sweeps, since the last sweep stops when enough are kept; AdamW instead of Adafactor.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, losses, select
from palate.config import MethodConfig
from palate.method import Method, Recipe, Share, Way
from palate.spending import Annotations, Rows, Spending, drawn, learnt
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
    """Loss on a pair: the DPO loss, a hinge on the same margin, or a hinge without reference."""
    beta: float = Field(0.05, gt=0)
    """Strength of the loss (the paper's gamma); for the hinges, 1 / beta is the required margin in nats."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_k: int = Field(40, ge=0)
    """Sample only from the k likeliest tokens; 0 means all tokens."""


class RSOConfig(Common, loops.OfflineConfig, loops.FromPool, loops.Batches):
    """Options of RSO; the defaults of the method's own options are the paper's."""

    variant: Literal["sft-sample-rank", "rso-sample-rank"] = "rso-sample-rank"
    """Source of the pairs: all samples of the starting policy (`sft-sample-rank`), samples filtered by
    rejection (`rso-sample-rank`), or the data (`direct`)."""
    n: int = Field(64, ge=2)
    """Number of candidates per prompt to sample and score before rejection."""
    accept: int = Field(8, ge=2)
    """Number of candidates per prompt that form pairs; sft-sample-rank samples only this many."""
    sample_beta: float = Field(0.5, ge=0)
    """Temperature of the rejection in units of reward (the paper's beta): 0 keeps the best candidates;
    rewards matter less as it grows."""
    pairing: Literal["first-round", "tournament"] = "first-round"
    """Pairs: disjoint random pairs (`first-round`), or winners and losers of a knock-out tournament."""
    ask: loops.Ask = "scores"
    """Label of a pair: from the `scores` of its two completions, or from `comparisons` by the annotator,
    which suits a judge or a ranker."""
    tie: float = Field(0.0, ge=0)
    """Largest reward difference that counts as a tie; tied pairs are dropped."""

    @model_validator(mode="after")
    def _thins(self) -> Self:
        if self.variant == "rso-sample-rank" and self.accept > self.n:
            raise ValueError(
                f"accept is {self.accept}, but n is only {self.n} candidates; lower accept or raise n"
            )
        return self


class RSODirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Options of RSO on the pairs of the data: its losses, without its sampling."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def rso(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RSOConfig, run: Run) -> None:
    """Train `policy` in place on its own candidates, filtered by rejection."""
    objective = _objective(policy, cfg)
    rng = Random(run.seed("select"))
    rejects = cfg.variant == "rso-sample-rank"
    n = cfg.n if rejects else cfg.accept
    pool = loops.open_pool(policy, cfg, run, n=n, sampling=cfg.sampling)
    annotate = loops.scored_by(annotate, pool)
    candidates = loops.draw(policy, prompts, n, cfg.sampling, run, pool=pool)  # y ~ pi_sft
    if rejects or cfg.ask == "scores":
        candidates = candidates.annotated(annotate)  # r
    if rejects:  # y ~ pi_sft exp(r / beta)
        candidates = candidates.thinned(
            lambda group: select.rejection_sample(group, cfg.accept, beta=cfg.sample_beta, rng=rng)
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


def spends(cfg: RSOConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    rejects = cfg.variant == "rso-sample-rank"
    n = cfg.n if rejects else cfg.accept
    pairs = rows.distinct * loops.pairs_of_candidates(cfg.pairing, cfg.accept)
    compares = cfg.ask == "comparisons"
    sampled = drawn(rows.distinct, n, size=n if rejects or not compares else 0)
    annotations = Spending(annotations=(Annotations(pairs, 2),)) if compares else Spending()
    return sampled + annotations + _learnt(cfg, cfg.total_steps(pairs), cfg.batch_size, pairs)


def spends_direct(cfg: RSODirectConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending on pairs of the data."""
    return _learnt(cfg, cfg.total_steps(rows.records), cfg.batch_size, rows.records)


def _learnt(cfg: Common, steps: int, batch: int, pairs: int) -> Spending:
    return learnt(steps, batch, 2, referenced=2 * pairs * losses.PAIR_LOSSES[LOSSES[cfg.loss]].needs_ref)


METHOD = Method(
    train=rso,
    config=RSOConfig,
    summary="learns from pairs of its own samples, filtered by reward to resemble a better policy's",
    paper="Liu et al. 2023, arXiv:2309.06657",
    group="online",
    learns_from="prompts",
    spends=spends,
    others=(Way(rso_direct, RSODirectConfig, "pairs", spends=spends_direct),),
    recipe=Recipe("human", "start", "once", ("policy", "reference"), ("policy",)),
    share=Share("once", n=16, fixed={"accept": 8}),
)
