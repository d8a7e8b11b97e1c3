"""Rank responses to align with human feedback (Yuan et al. 2023, arXiv:2304.05302).

The policy samples candidates for each prompt, and texts of the data can join them; the annotator scores all.
The ranking loss penalises each pair in which the completion with the lower reward has the higher mean
log-probability per token, without a margin; a second term imitates the best of each group. There is no
reference. Further rounds sample new candidates from the current policy. Variant direct treats each pair of
the data as a group of two.

Ours: scores are means over a completion's own tokens, and the likelihood is a sum, as in the paper's
equations; the published code divides by the padded length. Candidates are sampled with a temperature, not
with diverse beam search. Repeated candidates and groups with equal rewards are dropped and counted; AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, select
from palate.config import MethodConfig, Names
from palate.method import Method, Recipe, Share, Way
from palate.spending import Rows, Spending, drawn, learnt
from palate.types import Group, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    rank_weight: float = Field(1.0, ge=0)
    """Weight of the ranking loss relative to the likelihood of the best completion."""
    temperature: float = Field(0.8, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""


class RRHFConfig(Common, loops.FromPool, loops.RoundsConfig):
    """Options of RRHF; the defaults of n, rank_weight and temperature are the paper's."""

    variant: Literal["sampled"] = "sampled"
    """Learn from scored samples of the policy, or (`direct`) from the pairs of the data."""
    n: int = Field(4, ge=1)
    """Number of candidates per prompt to sample from the policy."""
    texts: Names = ()
    """Columns of the data with further candidates for each prompt, such as `chosen` and `rejected`."""

    @model_validator(mode="after")
    def _can_rank(self) -> Self:
        if self.n + len(self.texts) < 2:
            raise ValueError(
                "n is 1 and texts is empty, so there is nothing to rank; raise n or add columns to texts"
            )
        return self


class RRHFDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Options of RRHF on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def rrhf(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RRHFConfig, run: Run) -> None:
    """Train `policy` in place on its own ranked candidates."""
    texts = [loops.from_column(policy, prompt, name) for prompt in prompts for name in cfg.texts]
    loops.warn_of_long_texts(texts, cfg.max_new_tokens, run)
    objective = learn.RankedGroups(rank_weight=cfg.rank_weight)
    pool = loops.open_pool(policy, cfg, run, n=cfg.n, sampling=cfg.sampling)
    annotate = loops.scored_by(annotate, pool)
    for t in range(cfg.rounds):
        batch = loops.prompts_of_round(prompts, t, cfg, run)
        candidates = loops.draw(  # y_1..k ~ rho
            policy, batch, cfg.n, cfg.sampling, run, t, texts=cfg.texts, pool=pool
        )
        candidates = candidates.annotated(annotate)  # r_1..k
        _, dropped = select.select_pairs(candidates.groups, select.best_vs_worst)
        groups = [g for g in candidates.groups if isinstance(select.best_vs_worst(g), Pair)]  # r differ
        numbers = candidates.numbers(dropped, len(groups))
        loops.fit_round(policy, groups, lambda *_: objective, cfg, run, numbers=numbers, round_=t)


def rrhf_direct(
    policy: Policy, pairs: Sequence[Pair], cfg: RRHFDirectConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs, each as a group with rewards 1 and 0."""
    objective = learn.RankedGroups(rank_weight=cfg.rank_weight)
    groups, unseen = (
        [Group(pair.prompt, pair.completions, (1.0, 0.0)) for pair in part] for part in (pairs, held_out)
    )
    loops.fit(policy, groups, lambda *_: objective, cfg, run, unseen)


def spends(cfg: RRHFConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    prompts, size = loops.prompts_each_round(cfg, rows), cfg.n + len(cfg.texts)
    steps = cfg.total_steps(prompts)
    of_round = drawn(prompts, cfg.n, size=size) + learnt(steps, cfg.batch_size, size)
    return sum((of_round for _ in range(cfg.rounds)), Spending())


METHOD = Method(
    train=rrhf,
    config=RRHFConfig,
    summary="ranks all candidates of a prompt by their likelihood and imitates the best",
    paper="Yuan et al. 2023, arXiv:2304.05302",
    group="offline",
    learns_from="prompts",
    batches_of="group",
    spends=spends,
    others=(Way(rrhf_direct, RRHFDirectConfig, "pairs", spends=loops.spends_on_pairs_alone),),
    recipe=Recipe("human", "mixed", "once", ("policy",), ("policy", "reward model")),
    share=Share("once"),
)
