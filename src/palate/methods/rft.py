"""Rejection-sampling fine-tuning (Llama 2, Touvron et al. 2023, arXiv:2307.09288).

In rounds: sample many completions of each prompt from the policy as it is, keep the one of highest reward,
put it to the best ones of the rounds before, and fine-tune on all of them, beginning again from the model
that training started with. That the earlier rounds' best stay in is what keeps abilities from being lost.

Ours: of one prompt's best completions over the rounds the best is kept (`pool: all` keeps each round's); the
reward is the same in all rounds, where the paper has a better model in each; a completion without a usable
reward is never kept. The paper does not say how many completions it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from palate import learn, loops, select
from palate.config import Sampling, split_commas
from palate.errors import RunError
from palate.method import Method, Recipe
from palate.types import Example, Group, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class RFTConfig(loops.RoundsConfig):
    """Numbers of rejection-sampling fine-tuning."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 2e-5}

    rounds: int = Field(4, ge=1)
    """Rounds of sampling from the policy and learning; epochs and steps count for each."""
    n: int = Field(10, ge=2)
    """Completions per prompt, of which the best is kept."""
    pool: Literal["best", "all", "none"] = "all"
    """Completions of earlier rounds that stay: each round's best, as in the paper; per prompt the best of all
    rounds; or none."""
    restart: bool = True
    """Begin each round's training with the weights of the start; without, with those of the last round."""
    temperature: float = Field(1.2, gt=0)
    """1 samples the model as it is, more explores further; also that of the measurement at the end."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(split_commas)] = ()
    """Temperature of each round, where they differ; the last one is that of all rounds after it."""

    @property
    def compares_rewards(self) -> str | None:
        """The pool, if it keeps the best of several rounds."""
        compares = self.pool == "best" and self.rounds > 1
        return "pool best compares those of several rounds (all and none do not)" if compares else None

    def sampling_of(self, index: int) -> Sampling:
        """Return the sampling options of a round, counted from 0."""
        each = self.temperatures or (self.temperature,)
        return self.sampling.model_copy(update={"temperature": each[min(index, len(each) - 1)]})


def rft(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RFTConfig, run: Run) -> None:
    """Train `policy` in place to imitate the best of its own completions."""
    start = {f"weight/{name}": p.detach().clone() for name, p in policy.model.trained() if cfg.restart}
    pool: list[Group] = []
    for t in range(cfg.rounds):
        asked = loops.prompts_of_round(prompts, t, cfg, run)
        groups = policy.snapshot().sample(asked, cfg.n, cfg.sampling_of(t), seed=run.seed("sample", t))
        groups = annotate(groups)
        pool = pooled(pool, select.select_completions(groups, partial(select.top_k, k=1)).groups, cfg.pool)
        if not pool:
            raise RunError(f"round {t + 1}: no completion has a usable reward; see what the reward says")
        examples = [Example(g.prompt, g.completions[0]) for g in pool]
        if cfg.restart:
            policy.restore(start, version=policy.version, updates=0)
            # The learner compares sampled log-probabilities with its own; those of other weights differ.
            examples = [Example(e.prompt, replace(e.completion, logps=None)) for e in examples]
        policy.optimizer.restart(total_steps=cfg.total_steps(len(examples)))
        numbers = {"round": t + 1, **loops.sample_numbers(groups), **_pool_numbers(pool)}
        loops.fit(policy, examples, _likelihood, cfg, run, name=f"round {t}", numbers=numbers)


def _likelihood(batch: Sequence[Example], _: int) -> learn.Likelihood:
    return learn.Likelihood.per_token(batch)


def pooled(pool: Sequence[Group], best: Sequence[Group], how: Literal["best", "all", "none"]) -> list[Group]:
    """Return the groups to learn from, out of the pool so far and this round's best.

    Args:
        pool, best: groups of one completion each, with its reward; of two equal rewards the earlier stays.
        how: see `RFTConfig.pool`.
    """
    if how != "best":
        return [*pool, *best] if how == "all" else list(best)
    kept: dict[str, Group] = {}
    for group in (*pool, *best):
        asked = loops.content_key([group.prompt])  # with its columns: a reward that reads them is another's
        if asked not in kept or _reward(group) > _reward(kept[asked]):
            kept[asked] = group
    return list(kept.values())


def _reward(group: Group) -> float:
    (reward,) = group.rewards or (None,)
    assert reward is not None
    return reward


def _pool_numbers(pool: Sequence[Group]) -> dict[str, float]:
    return {"pool/size": len(pool), "pool/scores": sum(map(_reward, pool)) / len(pool)}


METHOD = Method(
    train=rft,
    config=RFTConfig,
    summary="rejection sampling: imitates the best of many completions, in rounds",
    paper="Touvron et al. 2023, arXiv:2307.09288",
    group="online",
    learns_from="prompts",
    batches_of="completion",
    recipe=Recipe("human", "current", "each round", ("policy", "reward model")),
)
