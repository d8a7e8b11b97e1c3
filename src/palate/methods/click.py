"""Contrastive learning on generations of one's own (CLICK; Zheng et al. 2023, arXiv:2306.03350).

Candidates of each prompt are drawn from the policy and labelled: those above a threshold of reward are
positive, the others negative. Pairs are formed by likelihood: a positive is set against a negative that
the policy finds likelier, so that what is put right is what is wrong. Then a positive is to be likelier
than its negative by a wide margin, while the policy stays a language model by the likelihood of a text.
No reference. In further rounds candidates are drawn anew. Variant direct learns from the data's pairs.

Ours: the paper's rule for pairs is not verified; which negatives count, and which of them is taken, are
options, and the default is the nearest of those likelier than the positive. The likelihood, not verified
either, is the positive's, per token, unless the data have a target. Identical pairs are dropped; AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses, select
from palate.config import MethodConfig
from palate.method import Method, Recipe, Way
from palate.types import AnchoredPair, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

Record = Pair | AnchoredPair


class Common(MethodConfig):
    """Fields of both ways. The code has margin and weight 20 and 0.5, 15 and 0.1, or 15 and 0.3."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(15.0, gt=0)
    """The margin (the paper's gamma): nats by which a positive is to be likelier; 20 for short dialogue."""
    pair_weight: float = Field(0.5, gt=0)
    """The paper's alpha: weight of the contrast beside the likelihood; 0.1 to 0.5."""
    anchor: Literal["positive", "target"] = "positive"
    """The text that stays likely: the positive of each pair, or the text in the data's column `target`."""
    target: str = "completion"
    """Column of the data that holds the target, for `--anchor target`."""
    likelihood: Literal["token", "sum"] = "token"
    """The anchors' likelihood is a mean over all tokens of an update, or a sum over each text."""
    temperature: float = Field(1.0, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""


class ClickConfig(Common, loops.RoundsConfig):
    """Numbers of CLICK; those of its own default to the code's."""

    has_threshold: ClassVar = True

    variant: Literal["sampled"] = "sampled"
    """Learn from labelled samples of the policy, or (`direct`) from the pairs of the data."""
    n: int = Field(20, ge=2)
    """Candidates per prompt."""
    threshold: float = 0.5
    """Candidates of a reward above it are positive, all others negative."""
    direction: Literal["above", "below", "either"] = "above"
    """A positive's negative is one of those likelier than itself, of those less likely, or of all."""
    partner: Literal["nearest", "farthest", "all"] = "nearest"
    """The choice among these negatives, by difference of log-probability."""


class ClickDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Numbers of CLICK on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def click(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: ClickConfig, run: Run) -> None:
    """Train `policy` in place on its own labelled candidates."""
    loops.check_columns(policy, prompts, [cfg.target] if cfg.anchor == "target" else [])
    rule = partial(
        select.by_likelihood_rank, threshold=cfg.threshold, direction=cfg.direction, partner=cfg.partner
    )
    for t in range(cfg.rounds):
        asked = loops.prompts_of_round(prompts, t, cfg, run)
        candidates = loops.draw(policy, asked, cfg.n, cfg.sampling, run, t).annotated(annotate)  # Y+, Y-
        pairs, dropped = select.select_pairs(candidates.groups, rule)  # log pi(y-) > log pi(y+)
        loops.fit_round(
            policy,
            _anchored(policy, pairs, cfg),
            lambda batch, _: _objective(batch, cfg),
            cfg,
            run,
            numbers=candidates.numbers(dropped, len(pairs)),
            advice=f"take another --threshold than {cfg.threshold:g}, a larger --n, or --direction either",
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
        return list(pairs)  # a pair without more has its better completion for an anchor
    return loops.with_targets(policy, pairs, cfg.target)


def _objective(batch: Sequence[Record], cfg: Common) -> learn.Anchored:
    """L_LM + alpha max(0, margin + log pi(y-) - log pi(y+))."""
    per_token = cfg.likelihood == "token"
    likelihood = learn.Likelihood.per_token(learn.anchors(batch)) if per_token else learn.Likelihood("sum")
    contrast = learn.Pairwise(losses.PAIR_LOSSES["click"], cfg.beta)
    return learn.Anchored(contrast, likelihood, pair_weight=cfg.pair_weight)


METHOD = Method(
    train=click,
    config=ClickConfig,
    summary="sets good samples of its own against bad ones that it finds likelier",
    paper="Zheng et al. 2023, arXiv:2306.03350",
    group="offline",
    learns_from="prompts",
    others=(Way(click_direct, ClickDirectConfig, "pairs"),),
    recipe=Recipe("human", "start", "once", ("policy",), ("policy", "reward model")),
)
