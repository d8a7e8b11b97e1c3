"""Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036).

Given pairs of a chosen and a rejected completion, regress the difference of their log-ratios to the constant
1 / (2 tau), Eq. 17. IPO assumes no Bradley-Terry model of preferences, and it does not push a pair apart
without end: beyond the target, the loss pulls the pair back.

Ours: the option `beta` is the paper's tau. Log-probabilities are summed over the completion, as in the
paper; several other trainers take the mean, which `reduce: mean` does. AdamW instead of Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe, Share
from palate.types import Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.run import Run


class IPOConfig(loops.OfflineConfig, loops.PairBatches):
    """Options of IPO. The paper trains no language model; 0.1 is the usual beta since then."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """Strength of the regularisation (the paper's tau): the target for the difference of log-ratios is
    1 / (2 beta) nats."""
    reduce: Literal["sum", "mean"] = "sum"
    """Log-probability of a completion: `sum` over its tokens, as in the paper, or `mean` per token."""


def ipo(
    policy: Policy, pairs: Sequence[Pair], cfg: IPOConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    ref = learn.CachedReference(policy.snapshot())  # pi_ref: the policy before training
    objective = learn.Pairwise(replace(losses.PAIR_LOSSES["ipo"], reduce=cfg.reduce), cfg.beta, ref)
    loops.fit(policy, pairs, lambda *_: objective, cfg, run, held_out)


METHOD = Method(
    train=ipo,
    config=IPOConfig,
    summary="identity preference optimisation on fixed pairs: a fixed target gap, which limits overfitting",
    paper="Azar et al. 2023, arXiv:2310.12036",
    group="offline",
    learns_from="pairs",
    spends=loops.spends_on_pairs,
    recipe=Recipe("human", "data", "once", ("policy", "reference"), ("policy",)),
    share=Share("pairs"),
)
