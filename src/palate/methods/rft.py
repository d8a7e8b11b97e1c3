"""Rejection-sampling fine-tuning (Llama 2, Touvron et al. 2023, arXiv:2307.09288).

Each round samples many completions of each prompt from the current policy, keeps the completion with the
highest reward, adds it to the pool of earlier rounds, and fine-tunes the starting model on the whole pool.
Keeping the best completions of earlier rounds prevents the loss of abilities.

Ours: `from_rounds: best` keeps one completion per prompt, the best of all rounds, instead of each round's
best;
all rounds use the same reward, while the paper improves its reward model between rounds; a completion
without a usable reward is never kept. The paper does not state its number of completions.
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
from palate.method import Method, Recipe, Share
from palate.spending import Rows, Spending, drawn, learnt
from palate.types import Example, Group, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class RFTConfig(loops.FromPool, loops.RoundsConfig):
    """Options of rejection-sampling fine-tuning."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 2e-5}

    rounds: int = Field(4, ge=1)
    """Number of sample-and-train rounds; epochs and steps count for each round."""
    n: int = Field(10, ge=2)
    """Number of completions per prompt, of which the best is kept."""
    from_rounds: Literal["all", "best", "last"] = "all"
    """Completions to train on, per prompt. `all`: each round's best, as in the paper; `best`: the best over
    all
    rounds; `last`: the best of this round only."""
    restart: bool = True
    """Train each round from the starting weights; with false, continue from the previous round."""
    temperature: float = Field(1.2, gt=0)
    """1 samples the model's own distribution; higher is more diverse. Also used for the measurement at the
    end."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(split_commas)] = ()
    """Temperature of each round; later rounds use the last value. Default: `temperature` in every round."""

    @property
    def compares_rewards(self) -> str | None:
        """The option that compares rewards of several rounds; None if nothing does."""
        compares = self.from_rounds == "best" and self.rounds > 1
        return (
            "from_rounds best compares rewards of several rounds (all and last do not)" if compares else None
        )

    def sampling_of(self, index: int) -> Sampling:
        """Return the sampling options of a round, counted from 0."""
        each = self.temperatures or (self.temperature,)
        return self.sampling.model_copy(update={"temperature": each[min(index, len(each) - 1)]})


def rft(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RFTConfig, run: Run) -> None:
    """Train `policy` in place to imitate the best of its own completions."""
    start = {f"weight/{name}": p.detach().clone() for name, p in policy.model.trained() if cfg.restart}
    candidates = loops.open_pool(policy, cfg, run, n=cfg.n, sampling=cfg.sampling_of(0))
    pool: list[Group] = []
    for t in range(cfg.rounds):
        batch, sampling = loops.prompts_of_round(prompts, t, cfg, run), cfg.sampling_of(t)
        groups = loops.scored_draw(policy, annotate, batch, cfg.n, sampling, run, t, candidates)
        best = select.select_completions(groups, partial(select.top_k, k=1)).groups
        pool = pooled(pool, best, cfg.from_rounds)
        if not pool:
            raise RunError(f"round {t + 1}: no completion has a usable reward; check the reward")
        examples = [Example(g.prompt, g.completions[0]) for g in pool]
        if cfg.restart:
            policy.restore(start, version=policy.version, updates=0)
            # The learner compares the sampler's log-probabilities with its own; other weights have others.
            examples = [Example(e.prompt, replace(e.completion, logps=None)) for e in examples]
        policy.optimizer.restart(total_steps=cfg.total_steps(len(examples)))
        numbers = {"round": t + 1, **loops.sample_numbers(groups), **_pool_numbers(pool)}
        loops.fit(policy, examples, _likelihood, cfg, run, name=f"round {t}", numbers=numbers)


def _likelihood(batch: Sequence[Example], _: int) -> learn.Likelihood:
    return learn.Likelihood.per_token(batch)


def pooled(pool: Sequence[Group], best: Sequence[Group], how: Literal["all", "best", "last"]) -> list[Group]:
    """Return the groups to learn from: the pool of earlier rounds combined with this round's best.

    Args:
        pool, best: groups of one completion each, with its reward; if rewards are equal, the earlier stays.
        how: see `RFTConfig.from_rounds`.
    """
    if how != "best":
        return [*pool, *best] if how == "all" else list(best)
    kept: dict[str, Group] = {}
    for group in (*pool, *best):
        key = loops.content_key([group.prompt])  # includes the columns, which a reward may read
        if key not in kept or _reward(group) > _reward(kept[key]):
            kept[key] = group
    return list(kept.values())


def _reward(group: Group) -> float:
    (reward,) = group.rewards or (None,)
    assert reward is not None
    return reward


def _pool_numbers(pool: Sequence[Group]) -> dict[str, float]:
    return {"pool/size": len(pool), "pool/scores": sum(map(_reward, pool)) / len(pool)}


def spends(cfg: RFTConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    prompts, total = loops.prompts_each_round(cfg, rows), Spending()
    for t in range(cfg.rounds):
        size = {"all": (t + 1) * prompts, "best": min((t + 1) * prompts, rows.distinct), "last": prompts}
        total += drawn(prompts, cfg.n) + learnt(cfg.total_steps(size[cfg.from_rounds]), cfg.batch_size, 1)
    return total


METHOD = Method(
    train=rft,
    config=RFTConfig,
    summary="rejection sampling: imitates the best of many completions, in rounds",
    paper="Touvron et al. 2023, arXiv:2307.09288",
    group="online",
    learns_from="prompts",
    batches_of="completion",
    spends=spends,
    recipe=Recipe("human", "current", "each round", ("policy", "reward model")),
    share=Share("each round", n=8, rounds=2),
)
