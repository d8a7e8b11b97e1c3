"""Pairwise Cringe optimisation (Xu et al. 2023, arXiv:2312.16682).

For a pair: imitate the chosen completion, and at each token of the rejected one prefer another token that
the model finds likely there (Cringe, Adolphs et al. 2022, arXiv:2211.05826). Both terms are weighed by a gate
that closes as the chosen completion becomes likelier than the rejected one: no reference is needed. Iterated,
each round takes the best and the worst of the policy's own completions; the first may have human pairs.

Ours: we could not read the paper. The gate's form, and that it compares summed log-probabilities, is as
others tell it; `b` and `tau` are ours, `alpha` and `k` those of the published code for the Cringe loss.
Whether gradient flows through the gate is an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops
from palate.config import MethodConfig
from palate.method import Method, Recipe, Way
from palate.types import Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    b: float = 0.0
    """Margin in nats between chosen and rejected at which the gate is half open."""
    tau: float = Field(10.0, gt=0)
    """Softness of the gate in nats: towards 0 a pair counts in full below b and not at all above."""
    alpha: float = Field(1.0, ge=0)
    """Weight of the loss on rejected tokens beside that on chosen ones."""
    k: int = Field(1, ge=1)
    """A rejected token is set against one drawn from the k likeliest others."""
    gate_gradient: bool = True
    """Let gradient flow through the gate; without, it is but a weight."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""

    def objective(self, pairs: Sequence[Pair], seed: int) -> learn.PairwiseCringe:
        """Return the loss of a batch, which draws contrasts by `seed`."""
        return learn.PairwiseCringe(
            seed, self.k, b=self.b, tau=self.tau, alpha=self.alpha, detach_gate=not self.gate_gradient
        )


class PairwiseCringeConfig(Common, loops.PairRounds):
    """Numbers of Pairwise Cringe."""

    variant: Literal["rounds"] = "rounds"
    """Rounds of its own completions, or (`direct`) one pass over preference pairs from data, without
    sampling."""


class PairwiseCringeDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Numbers of Pairwise Cringe on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def pairwise_cringe(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: PairwiseCringeConfig, run: Run
) -> None:
    """Train `policy` in place on rounds of its own labelled completions."""
    start = policy.snapshot() if cfg.label == "implicit" else None
    human = [] if cfg.pairs is None else loops.read_pairs(policy, cfg.pairs, cfg, run)[0]

    for t in range(cfg.rounds):
        now = policy.snapshot()  # M_t
        label = loops.labeller(annotate, t, now, start, 1.0, cfg, run)
        pairs, numbers = loops.pairs_of_round(t, now, label, prompts, human, cfg, run)
        del label, now  # a copy of the weights, where they are held while others are learnt
        policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)))
        loops.fit(policy, pairs, cfg.objective, cfg, run, name=f"round {t}", numbers=numbers)  # M_t+1


def pairwise_cringe_direct(
    policy: Policy,
    pairs: Sequence[Pair],
    cfg: PairwiseCringeDirectConfig,
    run: Run,
    *,
    held_out: Sequence[Pair] = (),
) -> None:
    """Train `policy` in place on preference pairs from data."""
    loops.fit(policy, pairs, cfg.objective, cfg, run, held_out)


METHOD = Method(
    train=pairwise_cringe,
    config=PairwiseCringeConfig,
    summary="imitates the chosen, contrasts each rejected token, and lets go of pairs that are in order",
    paper="Xu et al. 2023, arXiv:2312.16682",
    group="online",
    learns_from="prompts",
    others=(Way(pairwise_cringe_direct, PairwiseCringeDirectConfig, "pairs"),),
    recipe=Recipe("human", "current", "each round", ("policy", "reward model")),
)
