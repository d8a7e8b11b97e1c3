"""Reinforcement learning from human feedback, RLHF with PPO (Ouyang et al. 2022, arXiv:2203.02155; Stiennon
et al. 2020, arXiv:2009.01325; Schulman et al. 2017, arXiv:1707.06347).

Each step samples completions from the current policy. The reward model scores each whole completion; each
token gets a penalty for its log-ratio to the reference, which is the policy at the start. A value function
predicts the future rewards, and generalised advantage estimation compares its predictions with the actual
rewards. Then policy and value function take several optimizer steps on these completions, with PPO's clipped
losses. With PPO-ptx,
the likelihood of other texts is added to the loss.

Ours: any reward works, not only a trained reward model; the value function has its own learning rate instead
of a weight in one loss; the score counts at the last token itself; a truncated completion ends like any
other and gets the `missing_eos_penalty`; the mean reward of the starting model is subtracted from all
rewards; texts of PPO-ptx are prompts with completions; the weights have no moving average; REINFORCE and RLOO
(Ahmadian et al. 2024, arXiv:2402.14740) as estimators without a value function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from palate import loops
from palate.method import Method, Recipe, Share
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Learner, Policy
    from palate.run import Run


class RLHFConfig(loops.PolicyGradients):
    """Numbers of RLHF; the defaults are for LoRA and small models, the papers' are in configs/paper/."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 5e-6}


def rlhf(
    policy: Policy,
    annotate: Annotator,
    prompts: Sequence[Prompt],
    cfg: RLHFConfig,
    run: Run,
    critic: Learner | None = None,
) -> None:
    """Train `policy` in place on its own scored completions, together with `critic`."""
    loops.maximise_reward(policy, annotate, prompts, cfg, run, critic)


def load_critic(policy: Policy, cfg: RLHFConfig, *, seed: int) -> tuple[Learner, ...]:
    """Load the value function if the estimator has one."""
    return loops.load_critic(policy, cfg, seed=seed)


def summary(policy: Policy, run: Run, held_out: Sequence[Any]) -> dict[str, float]:
    """Return the number of steps (rollout phases) and of optimizer steps."""
    return {"steps": run.step_count, "updates": policy.version}


METHOD = Method(
    train=rlhf,
    config=RLHFConfig,
    summary="PPO on a reward, with a value function and a KL penalty per token",
    paper="Ouyang et al. 2022, arXiv:2203.02155",
    group="RL",
    learns_from="prompts",
    batches_of="prompt",
    spends=loops.spends_on_policy_gradients,
    recipe=Recipe("human", "current", "each step", ("policy", "reference", "reward model", "value")),
    beside=load_critic,
    summarise=summary,
    share=Share("each step", n=1, epochs_of=loops.updates_per_phase, fixed={"centre_on": "none"}),
)
