"""Reinforcement learning from AI feedback, RLAIF (Lee et al. 2023, arXiv:2309.00267).

A judge, which is a language model, takes the place of people. It compares two completions of the starting
policy in both orders; the mean of its two probabilities is a soft label. A reward model learns from the soft
labels by cross-entropy. Then policy gradients maximise its reward less a penalty for the KL to the starting
policy. Variant d-rlaif has no reward model: the judge gives each completion a score from 1 to 10, and the
expectation of that score under the judge's probabilities, rescaled to [-1, 1], is the reward.

Ours: any reward can stand for the judge, with the preferences of Bradley and Terry; the policy gradients are
those of `rlhf`, PPO by default (configs/paper/rlaif.yaml has REINFORCE with a value function, as the paper);
the objective is r - beta KL instead of (1 - beta) r - beta KL; completions are sampled at temperature 1,
which policy gradients need, instead of 0.9; the completions to compare can come from data; AdamW instead of
Adafactor; the wording of the judge's question.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from palate import loops
from palate.config import MethodConfig
from palate.method import Method, Recipe, Share, Way
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Learner, Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 5e-6}


class RLAIFConfig(Common, loops.LearntReward):
    """Options of RLAIF with a reward model."""

    variant: Literal["rlaif"] = "rlaif"
    """Source of the rewards: a reward model that first learns from a judge's preferences (`rlaif`), or the
    judge's own scores (`d-rlaif`)."""


class DirectRLAIFConfig(Common, loops.PolicyGradients):
    """Options of d-RLAIF, in which the judge's score is the reward."""

    variant: Literal["d-rlaif"] = "d-rlaif"
    """Use the judge's own scores as rewards."""

    @model_validator(mode="after")
    def _judge_scores(self) -> Self:
        if self.reward:
            raise ValueError(
                f"reward is {', '.join(map(str, self.reward))}, but d-rlaif learns from a judge's scores; "
                "use --judge, or the method rlhf, which takes any reward"
            )
        if self.judge_mode not in (None, "score"):
            raise ValueError(
                f"judge_mode is {self.judge_mode!r}, but the reward of d-rlaif is a score from 1 to 10; use "
                "score, or the method rlhf"
            )
        return self

    @property
    def compares_rewards(self) -> str:
        """The reason for which the judge scores each completion by itself."""
        return "the judge's score is the reward"


def rlaif(
    policy: Policy,
    annotate: Annotator,
    prompts: Sequence[Prompt],
    cfg: RLAIFConfig,
    run: Run,
    reward: Learner,
    critic: Learner | None = None,
) -> None:
    """Train `reward` on the judge's preferences, then `policy` on its rewards, both in place."""
    learners = [policy, reward] if critic is None else [policy, reward, critic]
    labelled = loops.preferences(policy, annotate, prompts, cfg, run)  # p = mean over both orders
    loops.fit_reward_model(reward, labelled, cfg, run, learners=learners)  # r_phi
    scores = loops.learnt_reward(reward, cfg, run)
    loops.maximise_reward(policy, scores, prompts, cfg, run, critic, others=[reward])


def d_rlaif(
    policy: Policy,
    annotate: Annotator,
    prompts: Sequence[Prompt],
    cfg: DirectRLAIFConfig,
    run: Run,
    critic: Learner | None = None,
) -> None:
    """Train `policy` in place on the judge's scores of its own completions, together with `critic`."""
    loops.maximise_reward(policy, annotate, prompts, cfg, run, critic)


def load_learners(policy: Policy, cfg: RLAIFConfig | DirectRLAIFConfig, *, seed: int) -> tuple[Learner, ...]:
    """Load the reward model, if there is one, and the value function, if the estimator has one."""
    critic = loops.load_critic(policy, cfg, seed=seed)
    if isinstance(cfg, DirectRLAIFConfig):
        return critic
    return (loops.load_reward_model(policy, cfg, seed=seed), *critic)


def summary(policy: Policy, run: Run, held_out: Sequence[Any]) -> dict[str, float]:
    """Return the numbers of steps and optimizer steps, and the reward model's agreement with the judge."""
    agreed = [row[AGREEMENT] for row in run.measured if AGREEMENT in row]
    ends = {"reward_accuracy_before": agreed[0], "reward_accuracy_after": agreed[-1]} if agreed else {}
    return {"steps": run.step_count, "updates": policy.version, **ends}


AGREEMENT = "eval_reward_model/accuracy"

METHOD = Method(
    train=rlaif,
    config=RLAIFConfig,
    summary="a judge's preferences train a reward model, whose rewards PPO maximises",
    paper="Lee et al. 2023, arXiv:2309.00267",
    group="RL",
    learns_from="prompts",
    batches_of="prompt",
    spends=loops.spends_on_learnt_reward,
    others=(Way(d_rlaif, DirectRLAIFConfig, "prompts", "prompt", spends=loops.spends_on_policy_gradients),),
    recipe=Recipe(
        "model",
        "current",
        "each step",
        ("policy", "reference", "reward model", "value"),
        ("policy", "reference", "value"),  # d-RLAIF uses the labelling model itself as reward
        external=True,
    ),
    beside=load_learners,
    summarise=summary,
    share=Share(
        "each step", n=1, epochs_of=loops.updates_per_phase, labelled=0.5, fixed={"centre_on": "none"}
    ),
)
