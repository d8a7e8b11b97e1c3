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
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.annotate import Annotator
from palate.learn import PairwiseCringe, Policy
from palate.loops.offline import fit
from palate.loops.pair_rounds import PairRounds, labeller, pairs_of_round
from palate.loops.records import read_pairs
from palate.loops.rounds import OF_ROUNDS
from palate.method import DIRECT, Method, Recipe
from palate.run import Run
from palate.types import Pair, Prompt


class PairwiseCringeConfig(PairRounds):
    """Numbers of Pairwise Cringe."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}
    unoffered: ClassVar = frozenset()
    sampled_only: ClassVar = OF_ROUNDS | {"n", "tie", "label", "mix_pairs"}

    variant: Literal["rounds", "direct"] = "rounds"
    """Rounds of its own completions, or one pass over preference pairs from data, without sampling."""
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
    eval_every: int | None = Field(None, ge=1)
    """With `variant: direct`, measure on the held-out pairs every so many steps, besides before and after."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.variant == DIRECT and self.pairs is not None:
            raise ValueError("variant is direct, which learns from the pairs of data; leave pairs out")
        return self

    def objective(self, pairs: Sequence[Pair], seed: int) -> PairwiseCringe:
        """The loss of a batch; contrasts are drawn by `seed`."""
        return PairwiseCringe(
            seed, self.k, b=self.b, tau=self.tau, alpha=self.alpha, detach_gate=not self.gate_gradient
        )


def pairwise_cringe(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: PairwiseCringeConfig, run: Run
) -> None:
    """Train `policy` in place on rounds of its own labelled completions."""
    start = policy.snapshot() if cfg.label == "implicit" else None
    human = [] if cfg.pairs is None else read_pairs(policy, cfg.pairs, cfg, run)[0]

    for t in range(cfg.rounds):
        now = policy.snapshot()  # M_t
        label = labeller(annotate, t, now, start, 1.0, cfg, run)
        pairs, numbers = pairs_of_round(t, now, label, prompts, human, cfg, run)
        del label, now  # a copy of the weights, where they are held while others are learnt
        policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)))
        fit(policy, pairs, cfg.objective, cfg, run, name=f"round {t}", numbers=numbers)  # M_t+1


def direct(
    policy: Policy,
    pairs: Sequence[Pair],
    cfg: PairwiseCringeConfig,
    run: Run,
    *,
    held_out: Sequence[Pair] = (),
) -> None:
    """Train `policy` in place on preference pairs from data."""
    fit(policy, pairs, cfg.objective, cfg, run, held_out)


METHOD = Method(
    train=pairwise_cringe,
    config=PairwiseCringeConfig,
    summary="imitates the chosen, contrasts each rejected token, and lets go of pairs that are in order",
    paper="Xu et al. 2023, arXiv:2312.16682",
    group="online",
    learns_from="prompts",
    recipe=Recipe("human", "current", "each round", ("policy", "reward model")),
    direct=direct,
)
