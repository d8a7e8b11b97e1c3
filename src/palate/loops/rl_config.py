"""Configuration of methods that learn by policy gradients. It loads neither torch nor numpy."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from palate.config import BatchConfig, KLConfig, MethodConfig, RewardConfig, Sampling, Source

BY_ESTIMATOR: dict[str, dict[str, Any]] = {
    "gae": {"n": 1, "ppo_epochs": 4, "whiten": True},
    "reinforce": {"n": 1, "ppo_epochs": 1, "whiten": True},
    "rloo": {"n": 4, "ppo_epochs": 1, "whiten": False},
}
"""Defaults that depend on the estimator."""

LONG = 64
"""Tokens above which lambda is 1 by default: with less, the score fades on its way to the first tokens."""


def _is_long(max_new_tokens: Any) -> bool:
    try:
        return max_new_tokens is None or int(max_new_tokens) > LONG
    except (TypeError, ValueError):
        return False  # not a number, which the field itself reports


class PolicyGradients(MethodConfig, RewardConfig, Sampling, KLConfig, BatchConfig):
    """Fields of methods that learn by policy gradients."""

    batch_size: int = Field(16, ge=1)
    """Prompts of a rollout phase."""
    steps: int = Field(100, ge=1)
    """Rollout phases: sample, score, then learn in `ppo_epochs` x `mini_batches` optimizer steps. Warm-up
    steps count optimizer steps."""
    missing_eos_penalty: float | None = Field(1.0, ge=0)
    """Taken off the reward of a completion that was cut at max_new_tokens. Give it in the unit of your
    reward: about the spread of the rewards. Without it, completions drift to the limit."""

    estimator: Literal["gae", "reinforce", "rloo"] = "gae"
    """The advantage of a token. `gae` needs a value function beside the policy. The other two do without:
    `reinforce` takes what is earned from the token on, less the mean of all tokens; `rloo` what the
    completion earns, less the mean of the other completions of its prompt."""
    n: int = Field(1, ge=1)
    """Completions per prompt: 1, for `rloo` 4."""
    beta: float = Field(0.05, ge=0)
    """Price of KL: reward per nat by which the policy moved from the reference."""
    kl_target: float | None = Field(None, gt=0)
    """Steer beta so that the KL stays near so many nats per completion; a fixed beta if not given."""
    kl_horizon: int = Field(10_000, ge=1)
    """With `kl_target`: completions over which beta changes by at most a fifth."""
    ppo_epochs: int = Field(4, ge=1)
    """Passes over the completions of a phase: 4; 1 for `reinforce` and `rloo`."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps per pass."""
    clip: float = Field(0.2, gt=0)
    """A token's probability may change by this share in a phase before its gradient ends."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount from one token to the next."""
    lam: float = Field(1.0, ge=0, le=1)
    """Lambda of `gae`: 1 trusts rewards alone, less trusts the value function more. Default: 0.95 up to a
    `max_new_tokens` of 64, and 1 above."""
    whiten: bool = True
    """Scale the advantages of a phase to mean 0 and variance 1; off for `rloo`."""
    centre_on: str = "start"
    """The mean that is taken off every reward, so that 0 is usual: `start` for the rewards of the starting
    model's own completions, data with prompts and completions for theirs, `none` for no mean."""
    centre_prompts: int = Field(64, ge=1)
    """Prompts (or rows of the data) from which that mean is computed, once."""

    value_model: str | None = None
    """With `gae`: the model that the value function starts from, a reward model or a language model. If not
    given, the model of `--reward model:ID` if it has the policy's tokens, else the policy with a head of
    zeros."""
    value_lr: float | None = Field(None, gt=0)
    """Learning rate of the value function; 3 times that of the policy if not given."""
    value_clip: float = Field(0.2, ge=0)
    """A value may change by so much in a phase before its gradient ends; 0 for no bound."""
    value_warmup: int = Field(0, ge=0)
    """First phases in which the value function learns and the policy does not."""

    pretrain_data: Source | None = None
    """Prompts with completions that the policy must keep likely (PPO-ptx): each optimizer step adds some."""
    pretrain_coef: float = Field(1.0, gt=0)
    """With `pretrain_data`: weight of their mean negative log-likelihood per token."""
    pretrain_batch_size: int = Field(16, ge=1)
    """With `pretrain_data`: completions of it per optimizer step."""

    @model_validator(mode="before")
    @classmethod
    def _of_estimator(cls, given: Any) -> Any:
        if isinstance(given, dict):
            own = BY_ESTIMATOR.get(str(given.get("estimator", "gae")), {})
            own = {**own, "lam": 1.0 if _is_long(given.get("max_new_tokens")) else 0.95}
            return {**given, **{name: value for name, value in own.items() if given.get(name) is None}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.estimator == "rloo" and self.n < 2:
            raise ValueError("n is 1, but rloo compares completions of a prompt; take at least 2")
        if self.estimator == "reinforce" and self.ppo_epochs * self.mini_batches > 1:
            raise ValueError(
                f"ppo_epochs is {self.ppo_epochs} and mini_batches {self.mini_batches}, but reinforce is "
                "right for one optimizer step per rollout phase; leave both at 1, or take the estimator gae "
                "or rloo, whose loss has bounds"
            )
        plain = Sampling.model_validate({})
        for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens"):
            if getattr(self, name) != getattr(plain, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected {getattr(plain, name)}: policy gradients are "
                    "right for samples from the policy as it is"
                )
        ranker = next((spec for spec in map(str, self.reward) if spec.startswith("ranker:")), None)
        if ranker is not None and self.estimator != "rloo":
            raise ValueError(
                f"reward is {ranker!r}, which compares the completions of a prompt, and {self.estimator} "
                "compares rewards of different prompts; take --estimator rloo, or a reward that scores, such "
                "as model:ID"
            )
        if self.value_model is not None and self.estimator != "gae":
            raise ValueError(
                f"value_model is {self.value_model!r}, but the estimator {self.estimator} has no value "
                "function; leave it out"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """The part of the method that compares rewards of different prompts, if one does.

        A judge then scores each completion by itself.
        """
        return None if self.estimator == "rloo" else "advantages compare completions of different prompts"

    @property
    def updates(self) -> int:
        """Optimizer steps of a rollout phase."""
        return self.ppo_epochs * self.mini_batches
