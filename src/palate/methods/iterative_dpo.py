"""Iterative DPO (Xu et al. 2023, arXiv:2312.16682).

In rounds: sample several completions of each prompt from the policy as it is, have a fixed reward model say
which are the best and the worst, and fit DPO's loss to these pairs, from the last round's policy and with it
as the reference. The first round may learn from human pairs instead.

Ours: the annotator may be any scorer or judge, or the policy's own implicit reward; the reference may be the
start of the run instead of the last round. We could not read the paper itself, and know it by the account of
Yuan et al. 2024, arXiv:2401.10020, whose n, temperature and top-p are taken; the rounds' own pairs alone are
learnt from unless `mix_pairs` adds the human ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class IterativeDPOConfig(loops.PairRounds):
    """Numbers of iterative DPO."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the reference."""
    ref: Literal["previous", "start"] = "previous"
    """The reference: the policy at the start of the round, or of the run."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model as it is, less is more decided."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""


def iterative_dpo(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: IterativeDPOConfig, run: Run
) -> None:
    """Train `policy` in place on rounds of its own labelled completions."""
    ref = policy.snapshot()
    start = ref if cfg.ref == "start" else None  # an unused snapshot would hold a copy of the weights
    human = [] if cfg.pairs is None else loops.read_pairs(policy, cfg.pairs, cfg, run)[0]

    for t in range(cfg.rounds):
        now = policy.snapshot()  # M_t
        # The reference of an implicit reward is the one that M_t was trained with: that of the round before.
        label = loops.labeller(annotate, t, now, ref, cfg.beta, cfg, run)
        pairs, numbers = loops.pairs_of_round(t, now, label, prompts, human, cfg, run)
        del label  # it may hold an old reference
        ref = now if start is None else start
        del now  # a second copy of the weights, where the reference stays
        objective = learn.Pairwise(losses.PAIR_LOSSES["dpo"], cfg.beta, learn.CachedReference(ref))
        policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)))
        each = loops.always(objective)
        loops.fit(policy, pairs, each, cfg, run, name=f"round {t}", numbers=numbers)  # M_t+1
        del each, objective


METHOD = Method(
    train=iterative_dpo,
    config=IterativeDPOConfig,
    summary="DPO in rounds, each on the best and worst of the policy's own completions",
    paper="Xu et al. 2023, arXiv:2312.16682",
    group="online",
    learns_from="prompts",
    recipe=Recipe(
        "human", "current", "each round", ("policy", "reference", "reward model"), ("policy", "reward model")
    ),
)
