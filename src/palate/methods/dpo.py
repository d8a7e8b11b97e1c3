"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290).

Given pairs of a chosen and a rejected completion, fit the policy so that its log-ratio to the frozen
reference ranks them, with the logistic loss of Eq. 7. DPO needs no reward model and no sampling: the reward
is implicit, beta * log(pi / ref).

Ours: pairs whose completions are equal, or become equal after truncation to the context, are dropped and
counted; AdamW instead of RMSprop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe, Share
from palate.types import Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.run import Run


class DPOConfig(loops.OfflineConfig, loops.PairBatches):
    """Options of DPO; the default of beta is the paper's."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference: higher stays closer. The paper uses 0.1, and 0.5 for
    summaries."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Assumed share of wrong preference labels (cDPO)."""


def dpo(
    policy: Policy, pairs: Sequence[Pair], cfg: DPOConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs."""
    ref = learn.CachedReference(policy.snapshot())  # pi_ref: the policy before training
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
    spends=loops.spends_on_pairs,
    recipe=Recipe("human", "data", "once", ("policy", "reference"), ("policy",)),
    share=Share("pairs"),
)
