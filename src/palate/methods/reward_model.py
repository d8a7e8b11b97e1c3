"""Reward models (Ouyang et al. 2022, arXiv:2203.02155), and the pairwise ranker of SLiC-HF and RSO (Zhao et
al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657).

Pointwise: a scalar head on the last token scores each completion by itself. The logistic loss on the
difference of a pair's scores makes this difference the log-odds that the first completion is preferred
(Bradley and Terry). Llama 2's margin (Touvron et al. 2023, arXiv:2307.09288) requires a larger difference
for clearer preferences, if the data grade them.

Ranker: the language model itself reads the prompt and both completions, in a random order per pair, and
learns to generate the label of the better one, by the likelihood of that token in the whole vocabulary. At
inference it is queried in both orders.

Ours: pairs are drawn one by one instead of all pairs of a prompt in one batch; pairs of equal completions
are dropped and counted; an optional loss term centres the rewards instead of a bias that is fitted after
training; the wording of the ranker's question.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from random import Random
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate import annotate, learn, loops, model
from palate.calibration import annotator_quality, before_and_after, ranking_quality
from palate.config import MethodConfig
from palate.method import Method, Recipe
from palate.types import Example, Pair

if TYPE_CHECKING:
    from palate.learn import Learner, Policy
    from palate.run import Run


class RewardModelConfig(MethodConfig, loops.PairBatches):
    """Options of a reward model; the default is one epoch, since reward models overfit in the second."""

    vetted_lr: ClassVar = {"lora": 2e-4, "full": 1e-5}
    unoffered: ClassVar = frozenset({"fresh_prompts"})  # a reward model generates no text

    kind: Literal["pointwise", "ranker"] = "pointwise"
    """`pointwise` scores each completion with a scalar head; `ranker` reads two and picks the better one."""
    margin_scale: float = Field(0.0, ge=0)
    """Pointwise: the required reward difference is this times the row's `margin`; Llama 2 uses 1 with margins
    from 0 to 1."""
    center_rewards_coefficient: float = Field(0.0, ge=0)
    """Pointwise: weight of a loss term that keeps rewards around 0 (the squared sum of a pair's rewards);
    0.01 is usual."""

    @model_validator(mode="after")
    def _of_the_kind(self) -> Self:
        for name in ("margin_scale", "center_rewards_coefficient"):
            if self.kind == "ranker" and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)}, but a ranker has no rewards; leave {name} out"
                )
        return self


def reward_model(
    learner: Learner,
    pairs: Sequence[Pair],
    cfg: RewardModelConfig,
    run: Run,
    *,
    held_out: Sequence[Pair] = (),
) -> None:
    """Train `learner` in place: a learner with a scalar head, or a policy for a ranker."""
    if isinstance(learner, learn.Policy):
        rng = Random(run.seed("order"))
        examples = [ranking_example(learner, pair, rng.random() < 0.5) for pair in pairs]
        measure = partial(_of_ranker, learner, held_out) if held_out else None
        loops.fit(learner, examples, lambda *_: learn.Likelihood("sum"), cfg, run, measure=measure)
    else:
        ranking = learn.Ranking(cfg.margin_scale, cfg.center_rewards_coefficient)
        measure = partial(_of_scores, learner, ranking, held_out) if held_out else None
        loops.fit(learner, pairs, lambda *_: ranking, cfg, run, measure=measure)


def ranking_example(policy: Policy, pair: Pair, chosen_first: bool) -> Example:
    """Return the ranker's question about a pair, with the label of the better completion as the answer."""
    codec = policy.model.codec
    texts = [completion.text for completion in (pair.completions if chosen_first else pair.completions[::-1])]
    label = annotate.labels(codec)[0 if chosen_first else 1]
    return Example(annotate.question(codec, pair.prompt, *texts), label)


def load(cfg: RewardModelConfig, *, total_steps: int, seed: int) -> Learner:
    """Load a learner with a scalar head, or a policy for a ranker."""
    if cfg.kind == "ranker":
        return learn.Policy.load(cfg, total_steps=total_steps, seed=seed)
    return learn.Learner.load(cfg, total_steps=total_steps, seed=seed, head="scalar")


def _of_ranker(policy: Policy, pairs: Sequence[Pair]) -> dict[str, float]:
    ranker = annotate.Ranker(policy.snapshot(), policy.model.codec)
    return annotator_quality(annotate.against_first(ranker), pairs).numbers()


def _of_scores(learner: Learner, ranking: learn.Ranking, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the quality of the ranking and the objective's own metrics, all from one pass."""
    loss, numbers = ranking(model.Outputs(scores=learner.scores(pairs)), pairs)
    means = {name: float(values.double().mean()) for name, values in {"loss": loss, **numbers}.items()}
    return {**ranking_quality(pairs, numbers["margin"].tolist()).numbers(), **means}


METHOD = Method(
    train=reward_model,
    config=RewardModelConfig,
    summary="a reward model from pairs: a scalar head, or a pairwise ranker",
    paper="Ouyang et al. 2022, arXiv:2203.02155",
    group="RL",
    learns_from="pairs",
    spends=loops.spends_on_pairs_alone,
    recipe=Recipe("human", "data", "once", ("reward model",)),
    learner=load,
    summarise=lambda learner, run, held_out: before_and_after(run.measured),
)
