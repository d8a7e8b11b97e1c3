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
from typing import ClassVar, Literal

from pydantic import Field

from palate.annotate import Annotator
from palate.learn import Anchored, Likelihood, Pairwise, Policy, anchors
from palate.loops.candidates import draw, fit_round
from palate.loops.offline import fit
from palate.loops.rounds import OF_ROUNDS, RoundsConfig, prompts_of_round
from palate.loops.texts import check_columns, with_targets
from palate.losses import PAIR_LOSSES
from palate.method import Method, Recipe
from palate.run import Run
from palate.select import by_likelihood_rank, select_pairs
from palate.types import AnchoredPair, Pair, Prompt

Record = Pair | AnchoredPair


class ClickConfig(RoundsConfig):
    """Numbers of CLICK, its code's; but margin and weight there are 20 and 0.5, 15 and 0.1, or 15 and 0.3."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}
    unoffered: ClassVar = frozenset[str]()  # pairs from data may be held out
    sampled_only: ClassVar = OF_ROUNDS | {"n", "threshold", "direction", "partner"}
    has_threshold: ClassVar = True

    variant: Literal["direct", "sampled"] = "sampled"
    """Learn from the pairs of the data, or from labelled samples of the policy."""
    beta: float = Field(15.0, gt=0)
    """The margin (the paper's gamma): nats by which a positive is to be likelier; 20 for short dialogue."""
    pair_weight: float = Field(0.5, gt=0)
    """The paper's alpha: weight of the contrast beside the likelihood; 0.1 to 0.5."""
    anchor: Literal["positive", "target"] = "positive"
    """What stays likely: the positive of each pair, or the text in the data's column `target`."""
    target: str = "completion"
    """Column of the data that holds the target, for `--anchor target`."""
    likelihood: Literal["token", "sum"] = "token"
    """Whether the anchors' likelihood is a mean over all tokens of an update, or a sum over each text."""
    n: int = Field(20, ge=2)
    """Candidates per prompt."""
    threshold: float = 0.5
    """Candidates of a reward above it are positive, all others negative."""
    direction: Literal["above", "below", "either"] = "above"
    """Where a positive's negative is looked for: among those likelier than itself, less likely, or all."""
    partner: Literal["nearest", "farthest", "all"] = "nearest"
    """Which of these negatives is taken, by difference of log-probability."""
    temperature: float = Field(1.0, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""


def click(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: ClickConfig, run: Run) -> None:
    """Train `policy` in place on its own labelled candidates."""
    check_columns(policy, prompts, [cfg.target] if cfg.anchor == "target" else [])
    rule = partial(by_likelihood_rank, threshold=cfg.threshold, direction=cfg.direction, partner=cfg.partner)
    for t in range(cfg.rounds):
        asked = prompts_of_round(prompts, t, cfg, run)
        candidates = draw(policy, asked, cfg.n, cfg.sampling, run, t).annotated(annotate)  # Y+, Y-
        pairs, dropped = select_pairs(candidates.groups, rule)  # (y+, y-), where log pi(y-) > log pi(y+)
        fit_round(
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
    policy: Policy, pairs: Sequence[Pair], cfg: ClickConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    records, unseen = (_anchored(policy, part, cfg) for part in (pairs, held_out))
    fit(policy, records, lambda batch, _: _objective(batch, cfg), cfg, run, unseen)


def _anchored(policy: Policy, pairs: Sequence[Pair], cfg: ClickConfig) -> list[Record]:
    if cfg.anchor == "positive":
        return list(pairs)  # a pair without more has its better completion for an anchor
    return with_targets(policy, pairs, cfg.target)


def _objective(batch: Sequence[Record], cfg: ClickConfig) -> Anchored:
    """L_LM + alpha max(0, margin + log pi(y-) - log pi(y+))."""
    likelihood = Likelihood.per_token(anchors(batch)) if cfg.likelihood == "token" else Likelihood("sum")
    return Anchored(Pairwise(PAIR_LOSSES["click"], cfg.beta), likelihood, pair_weight=cfg.pair_weight)


METHOD = Method(
    train=click,
    direct=click_direct,
    config=ClickConfig,
    summary="sets good samples of its own against bad ones that it finds likelier",
    paper="Zheng et al. 2023, arXiv:2306.03350",
    group="offline",
    learns_from="prompts",
    recipe=Recipe("human", "start", "once", ("policy",), ("policy", "reward model")),
)
