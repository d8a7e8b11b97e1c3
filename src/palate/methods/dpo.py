"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

Given pairs of completions of which one is preferred, fit the policy so that its log-ratio to the frozen
reference ranks them, by the logistic loss of Eq. 7. No reward model, no sampling: the reward is implicit,
beta * log(pi / ref).

Ours: pairs that are equal, or become equal when cut to the context, are left out and counted; AdamW
instead of RMSprop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe
from palate.types import Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.run import Run


class DPOConfig(loops.OfflineConfig, loops.PairBatches):
    """Numbers of DPO; beta defaults to the paper's."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference; the paper has 0.1, and 0.5 for summaries."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of labels taken to be wrong (cDPO)."""


def dpo(
    policy: Policy, pairs: Sequence[Pair], cfg: DPOConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    ref = learn.CachedReference(policy.snapshot())  # pi_ref: what training starts from
    smoothing = {"label_smoothing": cfg.label_smoothing}
    objective = learn.Pairwise(losses.PAIR_LOSSES["dpo"], cfg.beta, ref, smoothing)
    loops.fit(policy, pairs, lambda *_: objective, cfg, run, held_out)


METHOD = Method(
    train=dpo,
    config=DPOConfig,
    summary="direct preference optimisation on fixed pairs",
    paper="Rafailov et al. 2023, arXiv:2305.18290",
    group="offline",
    learns_from="pairs",
    recipe=Recipe("human", "data", "once", ("policy", "reference"), ("policy",)),
)
