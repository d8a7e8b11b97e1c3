"""Parts of policy gradients: the value function, the mean reward, PPO-ptx texts, the KL coefficient."""

from __future__ import annotations

from collections.abc import Sequence

from palate.advantages import adapted_beta
from palate.annotate import Annotator
from palate.config import LearnerConfig
from palate.data import Stream
from palate.errors import ModelError, RunError
from palate.learn import Learner, Policy
from palate.loops.records import once, read_examples
from palate.loops.rl_config import PolicyGradients
from palate.model import share_frozen
from palate.run import Run
from palate.types import Example, Group, Prompt

REWARD_MODEL = "model:"


def load_critic(policy: Policy, cfg: PolicyGradients, *, seed: int) -> tuple[Learner, ...]:
    """Load the value function for the estimator `gae`; the others have none.

    It reads the policy's tokens, and with LoRA it shares the base's weights with the policy.

    Raises:
        ModelError: `cfg.value_model` has other tokens than the policy, or cannot be loaded.
    """
    if cfg.estimator != "gae":
        return ()
    models = [s.removeprefix(REWARD_MODEL) for s in map(str, cfg.reward) if s.startswith(REWARD_MODEL)]
    sole = models[0] if len(models) == len(cfg.reward) == 1 else None
    critic = None
    if cfg.value_model or sole:
        critic = _critic(cfg, cfg.value_model or sole or "", seed)
        if not _same_tokens(policy, critic):
            if cfg.value_model:
                raise ModelError(
                    f"value_model {cfg.value_model!r} has other tokens than the policy {cfg.model!r}; "
                    "expected a model with the same tokenizer, or leave it out to start from the policy"
                )
            critic = None
    critic = critic or _critic(cfg, cfg.model, seed)
    critic.model.codec = policy.model.codec  # the chat template and the length limit are the policy's
    share_frozen(critic.model, policy.model)
    return (critic,)


def reward_centre(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: PolicyGradients, run: Run
) -> float:
    """Return the mean reward to subtract from every reward; see `PolicyGradients.centre_on`.

    Raises:
        RunError: none of the completions has a usable reward, or the run began with other
            data.
        DataError: the data cannot be used.
    """
    if cfg.centre_on == "none":
        return 0.0
    if cfg.centre_on == "start":
        drawn = once(prompts)[: cfg.centre_prompts]
        n = 1 if cfg.judge is None else cfg.n  # a judge may compare the completions of a prompt
        groups = policy.snapshot().sample(drawn, n, cfg.sampling, seed=run.seed("centre"))
    else:
        examples = read_examples(
            policy, cfg.centre_on, cfg, run, name="the completions for the mean", limit=cfg.centre_prompts
        )
        groups = [Group(e.prompt, (e.completion,)) for e in examples]
    rewards = [r for group in annotate(groups) for r in group.rewards or () if r is not None]
    if not rewards:
        raise RunError(
            f"none of {len(groups)} completions for the mean reward has a usable reward; check the reward, "
            "or use --centre-on none"
        )
    return sum(rewards) / len(rewards)


def pretraining(policy: Policy, cfg: PolicyGradients, run: Run) -> Stream[Example] | None:
    """Return the texts of PPO-ptx in a shuffled order; None without any.

    Raises:
        DataError: the data cannot be used.
        RunError: the run began with other texts.
    """
    if cfg.pretrain_data is None:
        return None
    name = "the texts to keep likely"
    examples = read_examples(policy, cfg.pretrain_data, cfg, run, name=name, limit=None)
    return Stream(examples, seed=run.seed("pretraining"))


def price_of_kl(cfg: PolicyGradients, run: Run) -> float:
    """Return beta of the next step; with `cfg.kl_target` it depends on the previous step."""
    last = run.last_step
    if cfg.kl_target is None or last is None or last.get("beta") is None:
        return cfg.beta
    kl = last.get("objective/kl")
    if kl is None:
        return float(last["beta"])
    count = int(last["rollouts/kept"])
    return adapted_beta(last["beta"], kl, target=cfg.kl_target, horizon=cfg.kl_horizon, count=count)


def _critic(cfg: PolicyGradients, model: str, seed: int) -> Learner:
    assert cfg.lr is not None, "the method's default learning rate is filled in before"
    changes = {"model": model, "lr": cfg.value_lr or 3 * cfg.lr}
    own = LearnerConfig.model_validate({**cfg.part(LearnerConfig).model_dump(), **changes})
    return Learner.load(own, total_steps=cfg.value_steps, seed=seed, head="value", name="critic")


def _same_tokens(policy: Policy, critic: Learner) -> bool:
    mine, theirs = (learner.model.codec.tokenizer.get_vocab() for learner in (policy, critic))
    return bool(mine == theirs)
