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

from palate import data, loops
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
    learners = [policy] if critic is None else [policy, critic]
    for learner in learners:
        learner.optimizer.total_steps = cfg.steps * cfg.updates
    ref = policy.snapshot()  # pi_ref
    texts = loops.pretraining(policy, cfg, run)
    centre = loops.reward_centre(policy, annotate, prompts, cfg, run)
    stream = data.Stream(prompts, seed=run.seed("prompts"))

    for step in run.steps(cfg.steps, *learners):
        batch = stream.batch(step, cfg.batch_size)  # x ~ D
        groups = annotate(policy.snapshot().sample(batch, cfg.n, cfg.sampling, seed=run.seed("sample", step)))
        kept, numbers = loops.usable(groups, cfg)
        beta = loops.price_of_kl(cfg, run)
        metrics: dict[str, float] = {}
        if kept:
            rollouts, of_phase = loops.roll_out(
                policy, critic, ref, kept, cfg, run, step=step, beta=beta, centre=centre
            )
            metrics = loops.learn_phase(policy, critic, rollouts, texts, cfg, run, step=step) | of_phase
        passed = {"beta": beta, "epoch": (step + 1) * cfg.batch_size / len(prompts)}
        run.log(step, metrics, numbers, passed, samples=groups)


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
    recipe=Recipe("human", "current", "each step", ("policy", "reference", "reward model", "value")),
    beside=load_critic,
    summarise=summary,
    share=Share("each step", n=1, epochs=4),
)
