"""Online AI feedback, also called online DPO (Guo et al. 2024, arXiv:2402.04792, Algorithm 1).

Each step draws prompts, samples completions from the current policy, lets an annotator compare them, and
takes one gradient step on a pairwise loss with the initial policy as the reference. No gradient flows
through sampling and annotation.

Ours: the annotator can be any scorer or judge; with n > 2 completions the best and the worst form the pair;
ties and identical pairs, which the paper trains on, are dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from palate import learn, loops, losses, select
from palate.config import BatchConfig, KLConfig, MethodConfig, RewardConfig, Rollouts
from palate.method import Method, Recipe, Share
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

BETA = {"dpo": 0.1, "ipo": 1.0, "hinge_norm": 0.002}
"""The paper's strength for each of its three losses (its tau, for IPO; its "SLiC" is hinge_norm)."""


class OAIFConfig(MethodConfig, RewardConfig, Rollouts, KLConfig, BatchConfig):
    """Options of online AI feedback; the defaults of temperature, loss and beta are the paper's."""

    vetted_lr: ClassVar = {"lora": 3e-4, "full": 2e-5}

    loss: Literal["dpo", "ipo", "hinge_norm"] = "dpo"
    """Loss on a pair. The paper's "SLiC" is `hinge_norm`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference: higher stays closer. Default: the paper's value for the
    loss: 0.1 for dpo, 1.0 for ipo (its tau), 0.002 for hinge_norm."""
    n: int = Field(2, ge=2)
    """Number of completions per prompt; with more than two, the best and the worst form the pair."""
    ahead: int = Field(0, ge=0)
    """Number of steps by which each batch is sampled early, from the policy as it is then, so that a judge on
    a server and a server that samples (`--rollouts`) work while the policy learns."""
    tie: float = Field(0.0, ge=0)
    """Largest reward difference that counts as a tie; tied pairs are dropped."""
    temperature: float = Field(0.9, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""

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
    batches = loops.Ahead(
        policy, annotate, prompts, n=cfg.n, batch_size=cfg.batch_size, steps=cfg.steps, sampling=cfg.sampling,
        ahead=cfg.ahead, run=run,
    )  # fmt: skip

    for step in run.steps(cfg.steps, policy):
        groups = batches.groups(step)  # x ~ D, y_1..n ~ pi_theta_t, the preferred completion
        pairs, dropped = select.select_pairs(groups, partial(select.best_vs_worst, tie=cfg.tie))  # (y+, y-)
        metrics = policy.update(pairs, objective) if pairs else {}  # theta_t -> theta_t+1
        passed = {"beta": cfg.beta, "epoch": (step + 1) * cfg.batch_size / len(prompts)}
        run.log(step, metrics, loops.group_numbers(groups, dropped), passed, samples=groups)


METHOD = Method(
    train=oaif,
    config=OAIFConfig,
    summary="online DPO: learns from rewards or verdicts on its own new completions",
    paper="Guo et al. 2024, arXiv:2402.04792",
    group="online",
    learns_from="prompts",
    batches_of="prompt",
    spends=loops.spends_each_step,
    recipe=Recipe("model", "current", "each step", ("policy", "reference"), ("policy",), external=True),
    share=Share("each step"),
)
