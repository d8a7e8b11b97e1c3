"""Online AI feedback, also called online DPO (Guo et al. 2024, arXiv:2402.04792, Algorithm 1).

Each step draws prompts, samples completions from the policy as it is now, has an annotator say which is
better, and takes one gradient step on a pairwise loss against the initial policy. Sampling and
annotation carry no gradient.

Ours: the annotator may be any scorer or judge; with n > 2 completions the best is set against the worst;
ties and identical pairs, which the paper trains on, are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from palate import data, learn, loops, losses, select
from palate.config import BatchConfig, KLConfig, MethodConfig, RewardConfig, Sampling
from palate.method import Method, Recipe
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

BETA = {"dpo": 0.1, "ipo": 1.0, "hinge_norm": 0.002}
"""The paper's strength for each of its three losses (its tau, for IPO; its "SLiC" is hinge_norm)."""


class OAIFConfig(MethodConfig, RewardConfig, Sampling, KLConfig, BatchConfig):
    """Numbers of online AI feedback; temperature, loss and beta default to the paper's."""

    vetted_lr: ClassVar = {"lora": 3e-4, "full": 2e-5}

    loss: Literal["dpo", "ipo", "hinge_norm"] = "dpo"
    """Loss on a pair. The paper's "SLiC" is `hinge_norm`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference: 0.1 for dpo, 1.0 for ipo (its tau), 0.002 for hinge_norm."""
    n: int = Field(2, ge=2)
    """Completions per prompt; of more than two, the best and the worst make the pair."""
    tie: float = Field(0.0, ge=0)
    """Rewards that differ by no more than this are a tie, and the pair is dropped."""
    temperature: float = Field(0.9, gt=0)
    """1 samples the model as it is, less is more decided."""

    @model_validator(mode="before")
    @classmethod
    def _beta_of_loss(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("beta") is None:
            return {**given, "beta": BETA.get(str(given.get("loss", "dpo")), BETA["dpo"])}
        return given


def oaif(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: OAIFConfig, run: Run) -> None:
    """Train `policy` in place on its own annotated completions."""
    ref = policy.snapshot()  # pi_theta_0, fixed
    objective = learn.Pairwise(losses.PAIR_LOSSES[cfg.loss], cfg.beta, ref)
    stream = data.Stream(prompts, seed=run.seed("prompts"))

    for step in run.steps(cfg.steps, policy):
        batch = stream.batch(step, cfg.batch_size)  # x ~ D
        seed = run.seed("sample", step)
        groups = policy.snapshot().sample(batch, cfg.n, cfg.sampling, seed=seed)  # y_1..n ~ pi_theta_t
        groups = annotate(groups)  # who is better
        pairs, dropped = select.select_pairs(groups, partial(select.best_vs_worst, tie=cfg.tie))  # (y+, y-)
        metrics = policy.update(pairs, objective) if pairs else {}  # theta_t -> theta_t+1
        passed = {"beta": cfg.beta, "epoch": (step + 1) * cfg.batch_size / len(prompts)}
        run.log(step, metrics, loops.group_numbers(groups, dropped), passed, samples=groups)


METHOD = Method(
    train=oaif,
    config=OAIFConfig,
    summary="online DPO: learns from rewards or verdicts on its own fresh completions",
    paper="Guo et al. 2024, arXiv:2402.04792",
    group="online",
    learns_from="prompts",
    batches_of="prompt",
    recipe=Recipe("model", "current", "each step", ("policy", "reference"), ("policy",), external=True),
)
