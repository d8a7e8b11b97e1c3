"""Configuration of methods that learn by policy gradients. It imports neither torch nor numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.config import BatchConfig, KLConfig, MethodConfig, RewardConfig, Rollouts, Sampling, Source

BY_ESTIMATOR: dict[str, dict[str, Any]] = {
    "gae": {"n": 1, "ppo_epochs": 4, "whiten": True, "centre_on": "start"},
    "reinforce": {"n": 1, "ppo_epochs": 1, "whiten": True, "centre_on": "start"},
    "rloo": {"n": 4, "ppo_epochs": 1, "whiten": False, "centre_on": "none"},
}
"""Defaults that depend on the estimator."""

OF_VALUES = dict.fromkeys(
    ("lam", "value_model", "value_lr", "value_clip", "value_warmup"), "has no value function"
)
IDLE: dict[str, dict[str, str]] = {
    "gae": {},
    "reinforce": {**OF_VALUES, "clip": "has no clipped loss"},
    "rloo": {
        **OF_VALUES,
        "gamma": "does not discount rewards",
        "centre_on": "compares the completions of one prompt, so that a mean cancels out",
    },
}
"""Options without an effect on an estimator, and the reasons."""

LONG = 64
"""Tokens above which lambda is 1 by default: otherwise the score would hardly reach the first tokens."""


def updates_per_phase(values: Mapping[str, Any]) -> int:
    """Return the number of optimizer steps per rollout phase that options give, as read from files and flags.

    Wrong values count as absent, since the configuration refuses them.
    """
    own = BY_ESTIMATOR.get(str(values.get("estimator")), BY_ESTIMATOR["gae"])
    counts = (str(values.get(name)) for name in ("ppo_epochs", "mini_batches"))
    passes, parts = (int(text) if text.isascii() and text.isdigit() else 0 for text in counts)
    return (passes or int(own["ppo_epochs"])) * (parts or 1)


def _defaults(estimator: str, max_new_tokens: Any) -> dict[str, Any]:
    """Return the defaults that depend on other options."""
    return {**BY_ESTIMATOR.get(estimator, {}), "lam": 1.0 if _is_long(max_new_tokens) else 0.95}


def _is_long(max_new_tokens: Any) -> bool:
    try:
        return max_new_tokens is None or int(max_new_tokens) > LONG
    except (TypeError, ValueError):
        return False  # not a number, which the field itself reports


class PolicyGradients(MethodConfig, RewardConfig, Rollouts, KLConfig, BatchConfig):
    """Fields of methods that learn by policy gradients."""

    batch_size: int = Field(16, ge=1)
    """Number of prompts per rollout phase."""
    steps: int = Field(100, ge=1)
    """Number of rollout phases: each samples, scores and takes `ppo_epochs` x `mini_batches` optimizer steps.
    `warmup_steps` counts optimizer steps."""
    missing_eos_penalty: float | None = Field(1.0, ge=0)
    """Penalty subtracted from the reward of a completion that is truncated at max_new_tokens, in the unit of
    your reward; choose about the spread of the rewards. Without it, completions drift to the limit."""

    estimator: Literal["gae", "reinforce", "rloo"] = "gae"
    """Estimator of a token's advantage. `gae` trains a value function beside the policy; the other two need
    none. `reinforce` uses the return from the token to the end, minus the mean over all tokens; `rloo` uses
    the completion's return, minus the mean of the other completions of its prompt."""
    n: int = Field(1, ge=1)
    """Completions per prompt; default: 1, and 4 for `rloo`."""
    beta: float = Field(0.05, ge=0)
    """Coefficient of the KL penalty: reward subtracted per nat of KL to the reference."""
    kl_target: float | None = Field(None, gt=0)
    """Adapt beta to keep the KL near this many nats per completion; default: beta is fixed."""
    kl_horizon: int = Field(10_000, ge=1)
    """With `kl_target`: number of completions over which beta changes by at most a fifth."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over the completions of a phase; default: 4, and 1 for `reinforce` and `rloo`."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass, at most `batch_size`: the completions of a prompt stay together."""
    clip: float = Field(0.2, gt=0)
    """With `gae` and `rloo`: clip range. A token's probability may change by this share in a phase before its
    gradient is zero."""
    ahead: int = Field(0, ge=0)
    """Number of phases by which each batch is sampled early, from the policy as it is then, so that a judge
    on a server and a server that samples (`--rollouts`) work while the policy learns."""
    importance_cap: float = Field(2.0, gt=0)
    """With `ahead`, or with a server that samples: largest weight of a token. The weight is its probability
    under the policy at the start of the phase, divided by that under the policy that sampled it."""
    gamma: float = Field(1.0, gt=0, le=1)
    """With `gae` and `reinforce`: discount factor per token."""
    lam: float = Field(1.0, ge=0, le=1)
    """With `gae`: its lambda. 1 uses only the rewards, lower values rely more on the value function. Default:
    0.95 for `max_new_tokens` up to 64, and 1 above."""
    whiten: bool = True
    """Scale the advantages of a phase to mean 0 and variance 1; off for `rloo`."""
    centre_on: str = "start"
    """Mean to subtract from every reward: `start` uses the rewards of the starting model's own completions,
    data with prompts and completions uses the rewards of these completions, `none` subtracts nothing.
    Default: `start`, and `none` for `rloo`, which compares completions of one prompt."""
    centre_prompts: int = Field(64, ge=1)
    """Number of prompts (or rows of the data) from which that mean is computed, once."""

    value_model: str | None = None
    """With `gae`: the model from which the value function starts, a reward model or a language model.
    Default: the model of `--reward model:ID` if it has the policy's tokens, else the policy with a head of
    zeros."""
    value_lr: float | None = Field(None, gt=0)
    """With `gae`: learning rate of the value function; default: 3 times the policy's."""
    value_clip: float = Field(0.2, ge=0)
    """With `gae`: clip range of values. A value may change by this much in a phase before its gradient is
    zero; 0 disables clipping."""
    value_warmup: int = Field(0, ge=0)
    """With `gae`: number of first phases that train only the value function; fewer than `steps`."""

    pretrain_data: Source | None = None
    """Data with prompts and completions that must stay likely (PPO-ptx): each optimizer step adds some."""
    pretrain_coef: float = Field(1.0, gt=0)
    """With `pretrain_data`: weight of their mean negative log-likelihood per token."""
    pretrain_batch_size: int = Field(16, ge=1)
    """With `pretrain_data`: number of its completions per optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _of_estimator(cls, given: Any) -> Any:
        if isinstance(given, dict):
            own = _defaults(str(given.get("estimator", "gae")), given.get("max_new_tokens"))
            return {**given, **{name: value for name, value in own.items() if given.get(name) is None}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.estimator == "rloo" and self.n < 2:
            raise ValueError("n is 1, but rloo compares completions of a prompt; use at least 2")
        if self.estimator == "reinforce" and self.ppo_epochs * self.mini_batches > 1:
            raise ValueError(
                f"ppo_epochs is {self.ppo_epochs} and mini_batches {self.mini_batches}, but reinforce is "
                "only correct for one optimizer step per rollout phase; leave both at 1, or use the "
                "estimator gae or rloo, whose loss is clipped"
            )
        if self.mini_batches > self.batch_size:
            raise ValueError(
                f"mini_batches is {self.mini_batches}, but a rollout phase has only {self.batch_size} "
                "prompts (batch_size), and the completions of a prompt stay together; use fewer mini-batches "
                "or larger batches"
            )
        plain = Sampling.model_validate({})
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens"):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected {getattr(plain, name)}: policy gradients "
                    "need samples from the policy's own distribution"
                )
        ranker = next((spec for spec in map(str, self.reward) if spec.startswith("ranker:")), None)
        if ranker is not None and self.estimator != "rloo" and not self.compares_pairs:
            raise ValueError(
                f"reward is {ranker!r}, which compares the completions of a prompt, and {self.estimator} "
                "compares rewards of different prompts; use --estimator rloo, or a reward that scores, such "
                "as model:ID"
            )
        return self

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        defaults = _defaults(self.estimator, self.max_new_tokens)
        for name, reason in IDLE[self.estimator].items():
            value = getattr(self, name)
            if value != defaults.get(name, type(self).model_fields[name].default):
                raise ValueError(
                    f"{name} is {value!r}, but the estimator {self.estimator} {reason}; leave it out"
                )
        if self.value_warmup >= self.steps:
            raise ValueError(
                f"value_warmup is {self.value_warmup}, but there are only {self.steps} rollout phases "
                "(steps), so the policy would not learn; lower value_warmup or take more steps"
            )
        if self.kl_target is None and self.kl_horizon != type(self).model_fields["kl_horizon"].default:
            raise ValueError(
                f"kl_horizon is {self.kl_horizon}, but there is no kl_target, so beta is fixed; set "
                "kl_target or leave kl_horizon out"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """The part of the method that compares rewards of different prompts, if one does.

        A judge then scores each completion by itself.
        """
        return None if self.estimator == "rloo" else "advantages compare completions of different prompts"

    @property
    def off_policy(self) -> bool:
        """Return whether completions come from another policy than the one that learns from them."""
        return self.ahead > 0 or self.rollouts != "local"

    @property
    def updates(self) -> int:
        """Return the number of optimizer steps per rollout phase."""
        return self.ppo_epochs * self.mini_batches

    @property
    def schedule_steps(self) -> int:
        """The optimizer steps of the policy's learning-rate schedule."""
        return (self.steps - self.value_warmup) * self.updates

    @property
    def value_steps(self) -> int:
        """The optimizer steps of the value function's learning-rate schedule."""
        return self.steps * self.updates


class LearntReward(PolicyGradients):
    """Fields of methods that first train a reward model on a judge's preferences.

    A reward in place of a judge gives the preferences of Bradley and Terry: the log-odds that one completion
    is preferred are the difference of the two rewards.
    """

    compares_pairs: ClassVar[bool] = True

    pairs: Source | None = None
    """Data with a prompt and two completions per row, which the judge compares; the preference in the data is
    not used. Default: the starting model's own completions of the prompts."""
    candidates: int = Field(2, ge=2)
    """Number of completions per prompt that the starting model samples for the judge, which compares each
    with each."""
    preference_prompts: int | None = Field(None, ge=2)
    """Number of prompts (or rows of `pairs`) whose completions the judge compares; default: all."""
    preference_held_out: float = Field(0.1, ge=0, lt=1)
    """Share of these prompts that the reward model does not learn from; they measure its agreement with the
    judge."""
    reward_lr: float | None = Field(None, gt=0)
    """Learning rate of the reward model; default: 2e-4 with LoRA, 1e-5 without."""
    reward_epochs: float = Field(2.0, gt=0)
    """Number of passes of the reward model over its pairs."""
    reward_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps of the reward model, instead of `reward_epochs`."""
    reward_batch_size: int = Field(16, ge=1)
    """Number of pairs per optimizer step of the reward model."""

    @model_validator(mode="after")
    def _of_a_judge(self) -> Self:
        if self.judge_mode not in (None, "pairwise"):
            raise ValueError(
                f"judge_mode is {self.judge_mode!r}, but the reward model learns from comparisons; use "
                "pairwise, or the variant d-rlaif, which uses the judge's scores themselves"
            )
        if self.pairs is not None and self.candidates != 2:
            raise ValueError(
                f"candidates is {self.candidates}, but the completions come from pairs; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fill_reward_lr(self) -> Self:
        if self.reward_lr is None:
            # The configuration is frozen for its users, but it is still under construction here.
            object.__setattr__(self, "reward_lr", 2e-4 if self.lora else 1e-5)
        return self

    def reward_total_steps(self, pairs: int) -> int:
        """Return the number of optimizer steps of the reward model."""
        return self.reward_steps or max(1, math.ceil(self.reward_epochs * pairs / self.reward_batch_size))
