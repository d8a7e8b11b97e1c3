"""Pairwise Cringe optimisation (Xu et al. 2023, arXiv:2312.16682).

For each pair, the loss imitates the chosen completion, and at each token of the rejected completion it
prefers another token that the model finds likely there (Cringe, Adolphs et al. 2022, arXiv:2211.05826). A
gate weights both terms and closes as the chosen completion becomes likelier than the rejected one, so no
reference is needed. Each round pairs the best with the worst of the policy's own completions; the first
round can learn from human pairs instead.

Ours: we could not read the paper. The form of the gate, which compares summed log-probabilities, follows
secondary sources; `b` and `tau` are ours, `alpha` and `k` are those of the published code for the Cringe
loss. The gradient through the gate is an option.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops
from palate.config import MethodConfig
from palate.method import Method, Recipe, Share, Way
from palate.types import Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    b: float = 0.0
    """Margin between chosen and rejected, in nats, at which a pair has half its weight."""
    tau: float = Field(10.0, gt=0)
    """Width of the gate around b, in nats; near 0, a pair has full weight below b and no weight above."""
    alpha: float = Field(1.0, ge=0)
    """Weight of the loss on rejected tokens relative to the loss on chosen tokens."""
    k: int = Field(1, ge=1)
    """Each rejected token is contrasted with a token drawn from the k likeliest others."""
    gate_gradient: bool = True
    """Let the gradient flow through the gate; with false, the gate only weights the loss."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""

    def objective(self, pairs: Sequence[Pair], seed: int) -> learn.PairwiseCringe:
        """Return the loss of a batch, with contrasting tokens drawn by `seed`."""
        return learn.PairwiseCringe(
            seed, self.k, b=self.b, tau=self.tau, alpha=self.alpha, detach_gate=not self.gate_gradient
        )


class PairwiseCringeConfig(Common, loops.PairRounds):
    """Options of Pairwise Cringe."""

    variant: Literal["rounds"] = "rounds"
    """Learn in rounds from the policy's own completions, or (`direct`) from the pairs of the data, without
    sampling."""


class PairwiseCringeDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Options of Pairwise Cringe on the pairs of the data."""

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
        del label, now  # they would keep a copy of the weights alive during training
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
    summary="imitates chosen completions, contrasts each rejected token, and stops at pairs ranked well",
    paper="Xu et al. 2023, arXiv:2312.16682",
    group="online",
    learns_from="prompts",
    spends=loops.spends_on_pair_rounds,
    others=(
        Way(pairwise_cringe_direct, PairwiseCringeDirectConfig, "pairs", spends=loops.spends_on_pairs_alone),
    ),
    recipe=Recipe("human", "current", "each round", ("policy", "reward model")),
    share=Share("each round", rounds=2),
)
