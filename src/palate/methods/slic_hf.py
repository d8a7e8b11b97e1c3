"""Sequence likelihood calibration from human feedback (Zhao et al. 2023, arXiv:2305.10425).

The policy itself is made to rank completions: the better one is to be at least delta nats likelier than
the worse one, and a target stays likely, which stands in for a reference. Variant sample-rank draws
candidates from the starting policy once, has them ranked, and learns from winners and losers of matches
between them; variant direct learns from the pairs of the data.

Ours: any scorer or judge; repeated candidates, ties and identical pairs are dropped; AdamW. The weight of
the target's likelihood is the least of those between which RSO (arXiv:2309.06657) found no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, losses
from palate.config import MethodConfig
from palate.method import Method, Recipe, Way
from palate.types import AnchoredPair, Group, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(1.0, gt=0)
    """The paper's delta: nats by which the better completion is to be likelier."""
    anchor: Literal["best", "target", "none"] = "best"
    """The text that stays likely: a prompt's best candidate, the data's column `target`, or nothing."""
    anchor_weight: float = Field(0.5, gt=0)
    """The paper's lambda: weight of the anchor's likelihood, summed over its tokens."""
    target: str = "completion"
    """Column of the data that holds the target, for `--anchor target`."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_k: int = Field(40, ge=0)
    """Draw from the k likeliest tokens only; 0 for all."""


class SlicHFConfig(Common, loops.OfflineConfig, loops.Batches):
    """Numbers of SLiC-HF; delta, candidates and sampling default to the paper's."""

    variant: Literal["sample-rank"] = "sample-rank"
    """Learn from ranked samples of the starting policy, or (`direct`) from the pairs of the data."""
    n: int = Field(8, ge=2)
    """Candidates per prompt."""
    pairing: Literal["tournament", "drawn", "best-vs-worst"] = "tournament"
    """Winners and losers of a knock-out tournament, n pairs drawn from all, or one pair of the extremes."""
    ask: loops.Ask = "scores"
    """A score for each candidate, or, as is fit for a ranker, a comparison for each match of a tournament."""
    tie: float = Field(0.0, ge=0)
    """Rewards that differ by no more than this are a tie, and the pair is dropped."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.ask == "comparisons" and self.pairing != "tournament":
            raise ValueError(
                f"ask is comparisons, by which pairing {self.pairing} cannot rank; take pairing tournament, "
                "or ask scores"
            )
        return self


class SlicHFDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Numbers of SLiC-HF on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def slic_hf(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: SlicHFConfig, run: Run
) -> None:
    """Train `policy` in place on its own ranked candidates."""
    loops.check_columns(policy, prompts, [cfg.target] if cfg.anchor == "target" else [])
    candidates = loops.draw(policy, prompts, cfg.n, cfg.sampling, run)  # y_1..m ~ pi_sft
    if cfg.ask == "scores":
        candidates = candidates.annotated(annotate)
    rng = Random(run.seed("select"))
    pairs, dropped = loops.paired(  # (y+, y-)
        candidates.groups, annotate, pairing=cfg.pairing, ask=cfg.ask, tie=cfg.tie, rng=rng
    )
    records = _anchored(policy, pairs, candidates.groups, cfg)  # and y_ref
    numbers = candidates.numbers(dropped, len(pairs))
    loops.fit_round(policy, records, lambda *_: _objective(cfg), cfg, run, numbers=numbers)


def slic_hf_direct(
    policy: Policy, pairs: Sequence[Pair], cfg: SlicHFDirectConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    records, unseen = (_anchored(policy, part, (), cfg) for part in (pairs, held_out))
    loops.fit(policy, records, lambda *_: _objective(cfg), cfg, run, unseen)


def _objective(cfg: Common) -> learn.Anchored:
    """max(0, delta - log pi(y+) + log pi(y-)) - lambda log pi(y_ref)."""
    weight = 0.0 if cfg.anchor == "none" else cfg.anchor_weight
    return learn.Anchored(learn.Pairwise(losses.PAIR_LOSSES["slic_rank"], cfg.beta), anchor_weight=weight)


def _anchored(
    policy: Policy, pairs: Sequence[Pair], groups: Sequence[Group], cfg: Common
) -> list[Pair | AnchoredPair]:
    """The pairs, each with what is to stay likely where that is not its better completion."""
    if cfg.anchor == "target":
        return loops.with_targets(policy, pairs, cfg.target)
    if cfg.anchor == "best" and groups:
        return loops.with_best(pairs, groups)
    return list(pairs)  # a pair's own better completion, or nothing


METHOD = Method(
    train=slic_hf,
    config=SlicHFConfig,
    summary="makes the policy itself rank its candidates, by a margin of likelihood, once sampled",
    paper="Zhao et al. 2023, arXiv:2305.10425",
    group="offline",
    learns_from="prompts",
    others=(Way(slic_hf_direct, SlicHFDirectConfig, "pairs"),),
    recipe=Recipe("human", "start", "once", ("policy",), ("policy", "reward model")),
)
