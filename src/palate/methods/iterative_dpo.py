"""Iterative DPO (Xu et al. 2023, arXiv:2312.16682).

Each round samples several completions of each prompt from the current policy, scores them with a fixed
reward model, pairs the best with the worst, and fits the DPO loss to these pairs. The reference is the
policy at the start of the round. The first round can learn from human pairs instead.

Ours: the annotator can be any scorer or judge, or the policy's own implicit reward; the reference can be the
policy at the start of the run. We could not read the paper itself; this follows the description in Yuan et
al. 2024, arXiv:2401.10020, including n, temperature and top-p. A round learns only from its own pairs unless
`mix_pairs` adds the human pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses
from palate.method import Method, Recipe, Share
from palate.spending import Rows, Spending
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run


class IterativeDPOConfig(loops.PairRounds):
    """Options of iterative DPO."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference: higher stays closer."""
    ref: Literal["previous", "start"] = "previous"
    """Reference: the policy at the start of the round (`previous`) or at the start of the run (`start`)."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""


def iterative_dpo(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: IterativeDPOConfig, run: Run
) -> None:
    """Train `policy` in place on rounds of its own labelled completions."""
    ref = policy.snapshot()
    start = ref if cfg.ref == "start" else None  # an unused snapshot would keep a copy of the weights alive
    human = [] if cfg.pairs is None else loops.read_pairs(policy, cfg.pairs, cfg, run)[0]

    for t in range(cfg.rounds):
        now = policy.snapshot()  # M_t
        # The implicit reward of M_t uses the reference that trained M_t, which is the previous round's.
        label = loops.labeller(annotate, t, now, ref, cfg.beta, cfg, run)
        pairs, numbers = loops.pairs_of_round(t, now, label, prompts, human, cfg, run)
        del label  # it may keep an old reference alive
        ref = now if start is None else start
        del now  # with a fixed reference, this would be a second copy of the weights
        objective = learn.Pairwise(losses.PAIR_LOSSES["dpo"], cfg.beta, learn.CachedReference(ref))
        policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)))
        each = loops.always(objective)
        loops.fit(policy, pairs, each, cfg, run, name=f"round {t}", numbers=numbers)  # M_t+1
        del each, objective


def spends(cfg: IterativeDPOConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    return loops.spends_on_pair_rounds(cfg, rows, reference=True)


METHOD = Method(
    train=iterative_dpo,
    config=IterativeDPOConfig,
    summary="DPO in rounds, on the best and worst of the policy's own completions",
    paper="Xu et al. 2023, arXiv:2312.16682",
    group="online",
    learns_from="prompts",
    spends=spends,
    recipe=Recipe(
        "human", "current", "each round", ("policy", "reference", "reward model"), ("policy", "reward model")
    ),
    share=Share("each round", rounds=2),
)
