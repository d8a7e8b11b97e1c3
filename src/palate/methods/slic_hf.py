"""Sequence likelihood calibration from human feedback (Zhao et al. 2023, arXiv:2305.10425).

The loss makes the better completion at least delta nats likelier than the worse one; a second term keeps a
target text likely and replaces a reference. Variant sample-rank samples candidates from the starting policy
once, lets the annotator rank them, and learns from winners and losers of matches between them; variant
direct learns from the pairs of the data.

Ours: any scorer or judge; repeated candidates, ties and identical pairs are dropped; AdamW. The weight of
the target's likelihood is the smallest of the values between which RSO (arXiv:2309.06657) found no
difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, losses
from palate.config import MethodConfig
from palate.method import Method, Recipe, Share, Way
from palate.spending import Annotations, Rows, Spending, drawn, learnt
from palate.types import AnchoredPair, Group, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(1.0, gt=0)
    """Margin in nats by which the better completion should be likelier (the paper's delta)."""
    anchor: Literal["best", "target", "none"] = "best"
    """Text to keep likely: the best candidate of the prompt, the target column of the data, or none."""
    anchor_weight: float = Field(0.5, gt=0)
    """Weight of the anchor's log-likelihood, summed over its tokens (the paper's lambda)."""
    target: str = "completion"
    """Column of the data that holds the target, for `--anchor target`."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_k: int = Field(40, ge=0)
    """Sample only from the k likeliest tokens; 0 means all tokens."""


class SlicHFConfig(Common, loops.OfflineConfig, loops.FromPool, loops.Batches):
    """Options of SLiC-HF; the defaults of beta, n and sampling are the paper's."""

    variant: Literal["sample-rank"] = "sample-rank"
    """Learn from ranked samples of the starting policy, or (`direct`) from the pairs of the data."""
    n: int = Field(8, ge=2)
    """Number of candidates per prompt."""
    pairing: Literal["tournament", "drawn", "best-vs-worst"] = "tournament"
    """Pairs: winners and losers of a knock-out tournament, n random pairs (`drawn`), or one pair of the best
    and the worst."""
    ask: loops.Ask = "scores"
    """Label of a pair: from the `scores` of its two completions, or from `comparisons` by the annotator,
    which suits a judge or a ranker."""
    tie: float = Field(0.0, ge=0)
    """Largest reward difference that counts as a tie; tied pairs are dropped."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.ask == "comparisons" and self.pairing != "tournament":
            raise ValueError(
                f"ask is comparisons, but pairing {self.pairing} needs scores; use pairing tournament or ask "
                "scores"
            )
        return self


class SlicHFDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Options of SLiC-HF on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def slic_hf(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: SlicHFConfig, run: Run
) -> None:
    """Train `policy` in place on its own ranked candidates."""
    loops.check_columns(policy, prompts, [cfg.target] if cfg.anchor == "target" else [])
    pool = loops.open_pool(policy, cfg, run, n=cfg.n, sampling=cfg.sampling)
    annotate = loops.scored_by(annotate, pool)
    candidates = loops.draw(policy, prompts, cfg.n, cfg.sampling, run, pool=pool)  # y_1..m ~ pi_sft
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
    """Return max(0, delta - log pi(y+) + log pi(y-)) - lambda log pi(y_ref)."""
    weight = 0.0 if cfg.anchor == "none" else cfg.anchor_weight
    return learn.Anchored(learn.Pairwise(losses.PAIR_LOSSES["slic_rank"], cfg.beta), anchor_weight=weight)


def _anchored(
    policy: Policy, pairs: Sequence[Pair], groups: Sequence[Group], cfg: Common
) -> Sequence[Pair | AnchoredPair]:
    """Return the pairs, each with its anchor unless the anchor is its chosen completion."""
    if cfg.anchor == "target":
        return loops.with_targets(policy, pairs, cfg.target)
    if cfg.anchor == "best" and groups:
        return loops.with_best(pairs, groups)
    return pairs  # the anchor is the chosen completion, or there is none


def spends(cfg: SlicHFConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    each = loops.pairs_of_candidates(cfg.pairing, cfg.n)
    pairs = rows.distinct * each
    annotations = Spending(annotations=(Annotations(pairs, 2),)) if cfg.ask == "comparisons" else Spending()
    sampled = drawn(rows.distinct, cfg.n, size=cfg.n if cfg.ask == "scores" else 0)
    return sampled + annotations + learnt(cfg.total_steps(pairs), cfg.batch_size, _completions(cfg))


def spends_direct(cfg: SlicHFDirectConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending on pairs of the data."""
    return learnt(cfg.total_steps(rows.records), cfg.batch_size, _completions(cfg))


def _completions(cfg: Common) -> int:
    """Return the most completions of a record: those of the pair, and an anchor that is another text."""
    return 2 if cfg.anchor == "none" else 3


METHOD = Method(
    train=slic_hf,
    config=SlicHFConfig,
    summary="samples candidates once and makes better ones likelier than worse ones by a margin",
    paper="Zhao et al. 2023, arXiv:2305.10425",
    group="offline",
    learns_from="prompts",
    spends=spends,
    others=(Way(slic_hf_direct, SlicHFDirectConfig, "pairs", spends=spends_direct),),
    recipe=Recipe("human", "start", "once", ("policy",), ("policy", "reward model")),
    share=Share("once"),
)
