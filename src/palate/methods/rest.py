"""Reinforced self-training, ReST (Gulcehre et al. 2023, arXiv:2308.08998, Algorithm 1).

In each round, *Grow* samples completions from the current policy and scores them; then several *Improve*
steps fine-tune on the completions whose reward is above a threshold. The threshold rises from step to step
while the learning rate falls. Each Improve step continues from the one before, and the policy after the last
step samples the next set. Demonstrations, if given, join every set and are filtered like the samples.

Ours: only the loss that the paper found best, the negative log-likelihood; a fixed number of Improve steps,
unless `validation` prompts are kept out: then a round ends, as in the paper, when the reward on them falls;
thresholds can be quantiles of the set's rewards, for rewards without a scale from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from palate import learn, loops, select
from palate.config import Numbers
from palate.method import Method, Recipe, Share
from palate.spending import Rows, Spending, drawn, learnt
from palate.types import Example, Group, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class ReSTConfig(loops.FromPool, loops.RoundsConfig):
    """Options of ReST."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 2e-5}
    has_threshold: ClassVar = True

    n: int = Field(10, ge=1)
    """Number of completions per prompt in a Grow step."""
    thresholds: Annotated[Numbers, Field(min_length=1)] = (0.7, 0.8, 0.9, 0.95)
    """One rising threshold per Improve step; the step trains on completions with a reward above it."""
    threshold_by: Literal["reward", "quantile"] = "reward"
    """Meaning of the thresholds: a `reward` (0 to 1 in the paper), or a `quantile` of the set's rewards."""
    lr_decay: float = Field(0.5, gt=0, le=1)
    """Factor on the learning rate from one Improve step to the next; each round starts at the full rate."""
    reduce: Literal["token", "mean", "sum"] = "token"
    """Weighting of the loss: `token` weights all tokens of a batch equally; `mean` and `sum` weight
    completions equally, each by the mean or the sum over its tokens."""
    validation: int = Field(0, ge=0)
    """Number of prompts that are kept out of the Grow steps and answered after every Improve step; a round
    ends when their mean reward falls. 0 takes all Improve steps."""
    demonstrations: str | None = None
    """Data set of prompts with completions that are scored and join every round's set; the options split,
    limit and map apply to it too."""

    @field_validator("thresholds")
    @classmethod
    def _rising(cls, thresholds: tuple[float, ...]) -> tuple[float, ...]:
        if not all(low < high for low, high in pairwise(thresholds)):
            raise ValueError(
                f"thresholds must rise from one Improve step to the next, but got {list(thresholds)}"
            )
        return thresholds

    @model_validator(mode="after")
    def _quantiles(self) -> Self:
        if self.threshold_by == "quantile" and not all(0 <= q < 1 for q in self.thresholds):
            raise ValueError(
                f"thresholds are quantiles and must be at least 0 and below 1, got {list(self.thresholds)}"
            )
        return self


def rest(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: ReSTConfig, run: Run) -> None:
    """Train `policy` in place to imitate its own completions of high reward."""
    shown = _demonstrations(policy, annotate, cfg, run)
    assert cfg.lr is not None
    prompts, unseen = loops.kept_out(prompts, cfg.validation, run)
    pool = loops.open_pool(policy, cfg, run, n=cfg.n, sampling=cfg.sampling)
    for g in range(cfg.rounds):
        batch = loops.prompts_of_round(prompts, g, cfg, run)  # Grow
        reached = loops.mean_reward(policy, annotate, unseen, cfg, run)
        groups = loops.scored_draw(policy, annotate, batch, cfg.n, cfg.sampling, run, g, pool)
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
    source, name = cfg.demonstrations, "the demonstrations"
    examples = loops.read_examples(policy, source, cfg, run, name=name, limit=cfg.limit)
    return annotate([Group(e.prompt, (e.completion,)) for e in examples])


def _likelihood(
    reduce: Literal["token", "mean", "sum"], examples: Sequence[Example], seed: int
) -> learn.Likelihood:
    return learn.Likelihood.per_token(examples) if reduce == "token" else learn.Likelihood(reduce)


def spends(cfg: ReSTConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending; `rows.others` counts the demonstrations."""
    improvements = len(cfg.thresholds)
    distinct = rows.distinct - cfg.validation
    prompts = distinct if cfg.prompts_per_round is None else min(distinct, cfg.prompts_per_round)
    steps = improvements * cfg.total_steps(prompts * cfg.n + rows.others)
    of_round = drawn(prompts, cfg.n) + learnt(steps, cfg.batch_size, 1)
    if cfg.validation:
        of_round += drawn(cfg.validation * (improvements + 1), 1)
    return sum((of_round for _ in range(cfg.rounds)), drawn(rows.others, 0, size=1))


METHOD = Method(
    train=rest,
    config=ReSTConfig,
    summary="samples sets of completions and imitates those above a rising reward threshold",
    paper="Gulcehre et al. 2023, arXiv:2308.08998",
    group="RL",
    learns_from="prompts",
    batches_of="completion",
    spends=spends,
    recipe=Recipe("human", "mixed", "each round", ("policy", "reward model")),
    share=Share("each round", n=8, stages=2, fixed={"threshold_by": "quantile", "thresholds": (0.5, 0.8)}),
)
