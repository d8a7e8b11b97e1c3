"""Reinforced self-training, ReST (Gulcehre et al. 2023, arXiv:2308.08998, Algorithm 1).

In rounds: *Grow* samples completions from the policy as it is and scores them; then several *Improve* steps
fine-tune on those whose reward is above a threshold, which rises from step to step while the learning rate
falls. Each Improve step goes on from the one before, and the last one's policy grows the next set. Data that
are at hand take part in every set, filtered like the samples.

Ours: of the losses that the paper tried there is the one it found best, the negative log-likelihood; the
number of Improve steps is fixed, unless `validation` prompts are kept out: then they end, as in the paper,
when the reward there falls; thresholds may be quantiles of the set's rewards, for rewards that have no scale
from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from palate import data, learn, loops, select
from palate.config import Numbers
from palate.method import Method, Recipe
from palate.types import Example, Group, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class ReSTConfig(loops.RoundsConfig):
    """Numbers of ReST."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 2e-5}
    has_threshold: ClassVar = True

    n: int = Field(10, ge=1)
    """Completions per prompt in a Grow step."""
    thresholds: Annotated[Numbers, Field(min_length=1)] = (0.7, 0.8, 0.9, 0.95)
    """The reward, or the quantile of rewards, above which completions are learnt from: one for each Improve
    step, rising."""
    threshold_by: Literal["reward", "quantile"] = "reward"
    """Whether thresholds are rewards, in the paper from 0 to 1, or quantiles of the set's rewards."""
    lr_decay: float = Field(0.5, gt=0, le=1)
    """Factor of the learning rate from one Improve step to the next; each round starts at the full rate."""
    reduce: Literal["token", "mean", "sum"] = "token"
    """All tokens of a batch count alike, or all completions, by the mean or the sum of their tokens."""
    validation: int = Field(0, ge=0)
    """Prompts of the data that are kept out of the Grow steps and answered after every Improve step; when
    their mean reward falls, the round ends. With 0, all Improve steps are taken."""
    demonstrations: str | None = None
    """Prompts with completions from data, read with the split, limit and map of the prompts; they are scored
    and take part in every round's set."""

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, given: tuple[float, ...]) -> tuple[float, ...]:
        if not all(low < high for low, high in pairwise(given)):
            raise ValueError(f"thresholds must rise from one Improve step to the next, got {list(given)}")
        return given

    @model_validator(mode="after")
    def _quantiles(self) -> Self:
        if self.threshold_by == "quantile" and not all(0 <= q < 1 for q in self.thresholds):
            raise ValueError(
                f"thresholds are quantiles, expected from 0 to below 1, got {list(self.thresholds)}"
            )
        return self


def rest(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: ReSTConfig, run: Run) -> None:
    """Train `policy` in place to imitate its own completions of high reward."""
    shown = _demonstrations(policy, annotate, cfg, run)
    assert cfg.lr is not None
    prompts, unseen = loops.kept_out(prompts, cfg.validation, run)
    for g in range(cfg.rounds):
        asked = loops.prompts_of_round(prompts, g, cfg, run)  # Grow
        reached = loops.mean_reward(policy, annotate, unseen, cfg, run)
        groups = annotate(policy.snapshot().sample(asked, cfg.n, cfg.sampling, seed=run.seed("sample", g)))
        for i, given in enumerate(cfg.thresholds):  # Improve
            tau = loops.threshold([*groups, *shown], given, cfg.threshold_by, f"round {g + 1}")
            if i == 0:
                loops.tell_low_threshold([*groups, *shown], tau, f"round {g + 1}", run)
            kept, _ = select.select_completions([*groups, *shown], partial(select.above_threshold, tau=tau))
            examples = [Example(group.prompt, c) for group in kept for c in group.completions]
            numbers = {
                **loops.sample_numbers(groups),
                "round": g + 1,
                "improve": i + 1,
                "threshold": tau,
                "completions/kept": len(examples),
            }
            steps = cfg.total_steps(len(examples))
            policy.optimizer.restart(total_steps=steps, lr=cfg.lr * cfg.lr_decay**i)
            name, objective = f"round {g} improve {i}", partial(_likelihood, cfg.reduce)
            loops.fit(policy, examples, objective, cfg, run, name=name, numbers=numbers)
            reached, before = loops.mean_reward(policy, annotate, unseen, cfg, run), reached
            if reached < before:
                run.display.say(
                    f"round {g + 1}: the reward on the {len(unseen)} prompts kept out fell from {before:.3f} "
                    f"to {reached:.3f}; no more Improve steps"
                )
                break


def _demonstrations(policy: Policy, annotate: Annotator, cfg: ReSTConfig, run: Run) -> list[Group]:
    if cfg.demonstrations is None:
        return []
    account, source = loops.account_of(cfg), cfg.demonstrations
    rows = data.read_demonstrations(
        source, split=cfg.split, columns=cfg.map, limit=cfg.limit, account=account
    )
    examples = loops.records_of(policy, rows, source, account, policy.model.codec.example)
    account.use(None)  # the reward may read any column
    run.report_data(source, account)
    run.require_same("the demonstrations", loops.content_key(examples), f"the data {cfg.demonstrations!r}")
    return annotate([Group(e.prompt, (e.completion,)) for e in examples])


def _likelihood(
    reduce: Literal["token", "mean", "sum"], examples: Sequence[Example], seed: int
) -> learn.Likelihood:
    return learn.Likelihood.per_token(examples) if reduce == "token" else learn.Likelihood(reduce)


METHOD = Method(
    train=rest,
    config=ReSTConfig,
    summary="grows a set of own completions, and imitates those above a rising reward",
    paper="Gulcehre et al. 2023, arXiv:2308.08998",
    group="RL",
    learns_from="prompts",
    batches_of="completion",
    recipe=Recipe("human", "mixed", "each round", ("policy", "reward model")),
)
