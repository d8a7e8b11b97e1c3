"""The loop of methods that learn by policy gradients: sample, score, learn, in phases."""

from __future__ import annotations

from collections.abc import Sequence

from palate.annotate import Annotator
from palate.learn import Learner, Policy
from palate.loops.critic import pretraining, price_of_kl, reward_centre
from palate.loops.rl_config import PolicyGradients
from palate.loops.rollouts import learn_phase, roll_out, usable
from palate.loops.stage import Ahead
from palate.run import Run
from palate.types import Prompt


def maximise_reward(
    policy: Policy,
    annotate: Annotator,
    prompts: Sequence[Prompt],
    cfg: PolicyGradients,
    run: Run,
    critic: Learner | None = None,
    *,
    others: Sequence[Learner] = (),
) -> None:
    """Train `policy` in place to maximise E[r(x, y)] - beta KL(policy || start), together with `critic`.

    Args:
        policy: trained in place; as it is now, it is the reference.
        annotate: gives the rewards.
        prompts: all prompts of the data.
        cfg, run: the method's configuration and its run; the loop is one of the run's stages.
        critic: the value function; None for an estimator without one.
        others: further learners of the run, which do not learn here but belong to its checkpoints.
    """
    critics = () if critic is None else (critic,)
    policy.optimizer.total_steps = cfg.schedule_steps
    if critic is not None:
        critic.optimizer.total_steps = cfg.value_steps
    ref = policy.snapshot()  # pi_ref
    texts = pretraining(policy, cfg, run)
    centre = reward_centre(policy, annotate, prompts, cfg, run)
    batches = Ahead(
        policy, annotate, prompts, n=cfg.n, batch_size=cfg.batch_size, steps=cfg.steps, sampling=cfg.sampling,
        ahead=cfg.ahead, run=run,
    )  # fmt: skip

    for step in run.steps(cfg.steps, policy, *others, *critics):
        groups = batches.groups(step)  # x ~ D, y ~ pi_theta_t
        kept, numbers = usable(groups, cfg)
        beta = price_of_kl(cfg, run)
        metrics: dict[str, float] = {}
        if kept:
            rollouts, of_phase = roll_out(
                policy, critic, ref, kept, cfg, run, step=step, beta=beta, centre=centre
            )
            metrics = learn_phase(policy, critic, rollouts, texts, cfg, run, step=step) | of_phase
        passed = {"beta": beta, "epoch": (step + 1) * cfg.batch_size / len(prompts)}
        run.log(step, metrics, numbers, passed, samples=groups)
