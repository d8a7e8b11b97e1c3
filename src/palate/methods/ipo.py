"""Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036).

Given pairs of completions of which one is preferred, regress the gap of log-ratios to the constant
1 / (2 tau), Eq. 17. It assumes no Bradley-Terry model of preferences, and it does not push a pair that is
already far enough apart: beyond the target, it pulls back.

Ours: `beta` in configuration is the paper's tau. Log-probabilities are summed over the completion, as in
the paper; several trainers take the mean, for which `reduce: mean` is there. AdamW instead of Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe
from palate.types import Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.run import Run


class IPOConfig(loops.OfflineConfig, loops.PairBatches):
    """Numbers of IPO. The paper has no language model; 0.1 is what is usual since."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """The paper's tau: the gap of log-ratios is drawn to 1 / (2 beta) nats."""
    reduce: Literal["sum", "mean"] = "sum"
    """Whether the gap is of whole completions, as in the paper, or of means per token."""


def ipo(
    policy: Policy, pairs: Sequence[Pair], cfg: IPOConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    ref = learn.CachedReference(policy.snapshot())  # pi_ref: what training starts from
    objective = learn.Pairwise(replace(losses.PAIR_LOSSES["ipo"], reduce=cfg.reduce), cfg.beta, ref)
    loops.fit(policy, pairs, lambda *_: objective, cfg, run, held_out)


METHOD = Method(
    train=ipo,
    config=IPOConfig,
    summary="identity preference optimisation on fixed pairs: a set gap instead of an endless push",
    paper="Azar et al. 2023, arXiv:2310.12036",
    group="offline",
    learns_from="pairs",
    recipe=Recipe("human", "data", "once", ("policy", "reference"), ("policy",)),
)
