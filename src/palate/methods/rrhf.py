"""Rank responses to align with human feedback (Yuan et al. 2023, arXiv:2304.05302).

Candidates of each prompt are drawn from the policy, and texts of the data may join them; all are scored.
Then the policy is to give no completion a higher mean log-probability per token than one of higher reward
has, without any margin, and to imitate the best of each group. No reference. In further rounds candidates
are drawn anew from the policy as it has become. Variant direct takes pairs from data for groups of two.

Ours: scores are means over a completion's own tokens, and its likelihood a sum, as the equations have it,
where the published code divides by the padded length. Candidates are drawn by temperature, not by diverse
beam search. Repeated ones, and groups in which no reward differs, are dropped and counted; AdamW.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import learn, loops, select
from palate.config import MethodConfig, Names
from palate.method import Method, Recipe, Way
from palate.types import Group, Pair, Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class Common(MethodConfig):
    """Fields of both ways."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    rank_weight: float = Field(1.0, ge=0)
    """Weight of the ranking, beside the likelihood of the best."""
    temperature: float = Field(0.8, gt=0)
    """1 samples the model as it is, less is more decided."""


class RRHFConfig(Common, loops.RoundsConfig):
    """Numbers of RRHF; candidates, weight and temperature default to the paper's."""

    variant: Literal["sampled"] = "sampled"
    """Learn from scored samples of the policy, or (`direct`) from the pairs of the data."""
    n: int = Field(4, ge=1)
    """Candidates per prompt that are sampled from the policy."""
    texts: Names = ()
    """Columns of the data whose texts join the samples of their prompt, such as `chosen` and `rejected`."""

    @model_validator(mode="after")
    def _can_rank(self) -> Self:
        if self.n + len(self.texts) < 2:
            raise ValueError(
                "n is 1 and no texts join it, so there is nothing to rank; raise n or name texts"
            )
        return self


class RRHFDirectConfig(Common, loops.OfflineConfig, loops.PairBatches):
    """Numbers of RRHF on the pairs of the data."""

    variant: Literal["direct"] = "direct"
    """Learn from the pairs of the data."""


def rrhf(policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: RRHFConfig, run: Run) -> None:
    """Train `policy` in place on its own ranked candidates."""
    texts = [loops.from_column(policy, prompt, name) for prompt in prompts for name in cfg.texts]
    loops.tell_long_texts(texts, cfg.max_new_tokens, run)
    objective = learn.RankedGroups(rank_weight=cfg.rank_weight)
    for t in range(cfg.rounds):
        asked = loops.prompts_of_round(prompts, t, cfg, run)
        candidates = loops.draw(policy, asked, cfg.n, cfg.sampling, run, t, texts=cfg.texts)  # y_1..k ~ rho
        candidates = candidates.annotated(annotate)  # r_1..k
        _, dropped = select.select_pairs(candidates.groups, select.best_vs_worst)
        groups = [g for g in candidates.groups if isinstance(select.best_vs_worst(g), Pair)]  # r differ
        numbers = candidates.numbers(dropped, len(groups))
        loops.fit_round(policy, groups, lambda *_: objective, cfg, run, numbers=numbers, round_=t)


def rrhf_direct(
    policy: Policy, pairs: Sequence[Pair], cfg: RRHFDirectConfig, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    """Train `policy` in place on preference pairs, each a group of rewards 1 and 0."""
    objective = learn.RankedGroups(rank_weight=cfg.rank_weight)
    groups, unseen = (
        [Group(pair.prompt, pair.completions, (1.0, 0.0)) for pair in part] for part in (pairs, held_out)
    )
    loops.fit(policy, groups, lambda *_: objective, cfg, run, unseen)


METHOD = Method(
    train=rrhf,
    config=RRHFConfig,
    summary="ranks all candidates of a prompt by their likelihood and imitates the best",
    paper="Yuan et al. 2023, arXiv:2304.05302",
    group="offline",
    learns_from="prompts",
    batches_of="group",
    others=(Way(rrhf_direct, RRHFDirectConfig, "pairs"),),
    recipe=Recipe("human", "mixed", "once", ("policy",), ("policy", "reward model")),
)
