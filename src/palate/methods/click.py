"""Contrastive learning on the policy's own generations (CLICK; Zheng et al. 2023, arXiv:2306.03350).

The policy samples candidates for each prompt. Candidates with a reward above a threshold are positive, the
others negative. Pairs are formed by likelihood: a positive is paired with a negative that the policy finds
likelier, so training corrects rankings that are wrong. The loss makes the positive likelier than its
negative by a wide margin, and a likelihood term on a text keeps the policy a good language model. There is
no reference. Further rounds sample new candidates. Variant direct learns from the pairs of the data.

Ours: the paper's rule for pairs is not verified, so `direction` and `partner` are options; the default is
the nearest negative that is likelier than the positive. The likelihood term is not verified either; it is
the positive's, per token, unless the data have a target. Identical pairs are dropped; AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses, select
from palate.config import MethodConfig
from palate.method import Method, Recipe, Share, Way
from palate.spending import Rows, Spending, drawn, learnt
from palate.types import AnchoredPair, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

Record = Pair | AnchoredPair


class Common(MethodConfig):
    """Fields of both ways. The authors' code uses margin and weight 20 and 0.5, 15 and 0.1, or 15 and 0.3."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(15.0, gt=0)
    """Margin in nats by which a positive should be likelier than its negative (the paper's gamma); the paper
    uses 20 for short dialogue."""
    pair_weight: float = Field(0.5, gt=0)
    """Weight of the contrastive loss relative to the likelihood (the paper's alpha, 0.1 to 0.5)."""
    anchor: Literal["positive", "target"] = "positive"
    """Text that the likelihood term keeps likely: the positive of each pair, or the data's target column."""
    target: str = "completion"
    """Column of the data that holds the target, for `--anchor target`."""
    likelihood: Literal["token", "sum"] = "token"
    """Likelihood of the anchors: `token` is the mean over all tokens of an update, `sum` the sum per text."""
    temperature: float = Field(1.0, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""


class ClickConfig(Common, loops.FromPool, loops.RoundsConfig):
    """Options of CLICK; the defaults of its own options are those of the authors' code."""

    has_threshold: ClassVar = True

    variant: Literal["sampled"] = "sampled"
    """Learn from labelled samples of the policy, or (`direct`) from the pairs of the data."""
    n: int = Field(20, ge=2)
    """Number of candidates per prompt."""
    threshold: float = 0.5
    """Candidates with a reward above this are positive, all others negative."""
    direction: Literal["above", "below", "either"] = "above"
    """Negatives to pair a positive with: those likelier than the positive (`above`), those less likely
    (`below`), or all (`either`)."""
    partner: Literal["nearest", "farthest", "all"] = "nearest"
    """Choice among these negatives, by the difference in log-probability."""


class ClickDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Options of CLICK on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def click(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: ClickConfig, run: Run) -> None:
    """Train `policy` in place on its own labelled candidates."""
    loops.check_columns(policy, prompts, [cfg.target] if cfg.anchor == "target" else [])
    rule = partial(
        select.by_likelihood_rank, threshold=cfg.threshold, direction=cfg.direction, partner=cfg.partner
    )
    pool = loops.open_pool(policy, cfg, run, n=cfg.n, sampling=cfg.sampling)
    annotate = loops.scored_by(annotate, pool)
    for t in range(cfg.rounds):
        batch = loops.prompts_of_round(prompts, t, cfg, run)
        candidates = loops.draw(policy, batch, cfg.n, cfg.sampling, run, t, pool=pool)
        candidates = candidates.annotated(annotate)  # Y+, Y-
        pairs, dropped = select.select_pairs(candidates.groups, rule)  # log pi(y-) > log pi(y+)
        loops.fit_round(
            policy,
            _anchored(policy, pairs, cfg),
            lambda batch, _: _objective(batch, cfg),
            cfg,
            run,
            numbers=candidates.numbers(dropped, len(pairs)),
            advice=f"change --threshold ({cfg.threshold:g}), raise --n, or use --direction either",
            round_=t,
        )


def click_direct(
    policy: Policy, pairs: Sequence[Pair], cfg: ClickDirectConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    records, unseen = (_anchored(policy, part, cfg) for part in (pairs, held_out))
    loops.fit(policy, records, lambda batch, _: _objective(batch, cfg), cfg, run, unseen)


def _anchored(policy: Policy, pairs: Sequence[Pair], cfg: Common) -> list[Record]:
    if cfg.anchor == "positive":
        return list(pairs)  # the anchor of a plain pair is its chosen completion
    return loops.with_targets(policy, pairs, cfg.target)


def _objective(batch: Sequence[Record], cfg: Common) -> learn.Anchored:
    """Return L_LM + alpha max(0, margin + log pi(y-) - log pi(y+))."""
    per_token = cfg.likelihood == "token"
    likelihood = learn.Likelihood.per_token(learn.anchors(batch)) if per_token else learn.Likelihood("sum")
    contrast = learn.Pairwise(losses.PAIR_LOSSES["click"], cfg.beta)
    return learn.Anchored(contrast, likelihood, pair_weight=cfg.pair_weight)


def spends(cfg: ClickConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    prompts = loops.prompts_each_round(cfg, rows)
    each = cfg.n * cfg.n // 4 if cfg.partner == "all" else cfg.n - 1
    steps = cfg.total_steps(prompts * each)
    of_round = drawn(prompts, cfg.n) + learnt(steps, cfg.batch_size, _completions(cfg))
    return sum((of_round for _ in range(cfg.rounds)), Spending())


def spends_direct(cfg: ClickDirectConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending on pairs of the data."""
    return learnt(cfg.total_steps(rows.records), cfg.batch_size, _completions(cfg))


def _completions(cfg: Common) -> int:
    return 2 if cfg.anchor == "positive" else 3


METHOD = Method(
    train=click,
    config=ClickConfig,
    summary="contrasts the policy's good samples with bad ones that it finds likelier",
    paper="Zheng et al. 2023, arXiv:2306.03350",
    group="offline",
    learns_from="prompts",
    spends=spends,
    others=(Way(click_direct, ClickDirectConfig, "pairs", spends=spends_direct),),
    recipe=Recipe("human", "start", "once", ("policy",), ("policy", "reward model")),
    share=Share("once"),
)
