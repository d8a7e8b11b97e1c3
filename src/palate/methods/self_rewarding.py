"""Self-rewarding language models (Yuan et al. 2024, arXiv:2401.10020).

The model learns to grade answers and then trains on its own grades. M0 becomes M1 by imitating demonstrations
(IFT) and gradings (EFT). Each round starts from M_t: a model that stays the same writes new prompts, M_t
answers each n times and grades each answer three times with an additive rubric, and the mean is the score.
The best and the worst answer of a prompt form a pair; equal scores are dropped. DPO on these pairs, from M_t
and with M_t as the reference, gives M_t+1, which answers and grades in the next round.

With `variant: meta` (Wu et al. 2024, arXiv:2407.19594) the first rounds also train the judge: for each
prompt, the policy compares the gradings of the answer whose scores vary most, and the best and the worst
grading form a pair.

Ours: the rubric's words; the judge may be another model or a reward, which makes this iterative OAIF, and may
compare answers in pairs; without data for M1 the model itself is M1; prompts may come from data. The judge is
checked on the first prompts of each round, and a useless one ends the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from palate import learn, loops, losses, select
from palate.config import Source
from palate.method import Method, Recipe, Share
from palate.spending import Annotations, Rows, Spending, drawn, learnt
from palate.types import Prompt

if TYPE_CHECKING:
    from palate.annotate import Annotator
    from palate.learn import Policy
    from palate.run import Run

OWN_JUDGE: Mapping[str, Any] = {"judge": "self", "judge_mode": "rubric", "judge_samples": 3}
"""The judge of the paper, used unless a judge or a reward is given."""


class SelfRewardingConfig(loops.RoundsConfig):
    """Options of self-rewarding; the defaults of rounds, n, temperature, top-p and beta are the paper's. The
    judge is the policy (`self`) with a rubric and three gradings, unless a judge or a reward is given.
    """

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}

    variant: Literal["self", "meta"] = "self"
    """`meta` trains the judge too (meta-rewarding): the policy compares its own gradings, and learns from the
    best and the worst."""
    meta_rounds: int = Field(2, ge=1)
    """With `variant: meta`, number of rounds in which the judge learns; the later ones train answers only."""
    rounds: int = Field(2, ge=1)
    """Number of rounds after M1."""
    n: int = Field(4, ge=2)
    """Number of completions per prompt; the best and the worst form the pair."""
    tie: float = Field(0.0, ge=0)
    """Largest difference in score that counts as a tie; tied pairs are dropped."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the reference: higher stays closer."""
    temperature: float = Field(0.7, gt=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""
    ift: Source | None = None
    """Demonstrations for M1: answers to imitate. Default: none."""
    eft: Source | None = None
    """Gradings for M1, from `palate make eft`. Default: none; the model must be able to grade already."""
    sft_epochs: float = Field(1.0, gt=0)
    """Number of passes over the demonstrations and gradings."""
    sft_lr: float | None = Field(None, gt=0)
    """Peak learning rate for M1; default: `lr`."""
    new_prompts: str | None = None
    """Writer of new prompts for each round, after the prompts of the data: a hub id or a directory, or `sft`
    for M1. Default: rounds use the prompts of the data."""
    new_prompt_tokens: int = Field(256, ge=1)
    """Maximum number of tokens of a reply with new prompts."""
    learn: Literal["pairs", "positives"] = "pairs"
    """Learn from pairs by DPO, or imitate the best completion of each prompt (`positives`)."""
    positive_score: float | None = None
    """With `learn: positives`, the lowest score of a completion to imitate; 5 in the paper. Default: any."""
    length_tier: float | None = Field(None, ge=0, lt=0.5)
    """Against growing lengths: the chosen completion is the shortest whose score is within this share of the
    range from the best, and the rejected is the longest near the worst. 0 only decides between equal scores.
    Default: the first of the best and of the worst."""
    judge_data: Source | None = None
    """Held-out ranked answers to measure the judge on, such as the held-out part of `palate make eft`."""
    judge_gap: float = Field(0.0, ge=0)
    """Smallest difference between people's scores of two answers that makes a pair of `judge_data`."""

    @model_validator(mode="before")
    @classmethod
    def _own_judge(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("reward"):
            return given
        judge = given.get("judge")
        block = {str(key).removeprefix("judge_") for key in judge} if isinstance(judge, Mapping) else set()
        free = [name for name in OWN_JUDGE if name.removeprefix("judge_") not in block]
        return {**given, **{name: OWN_JUDGE[name] for name in free if given.get(name) is None}}

    @model_validator(mode="after")
    def _fits(self) -> SelfRewardingConfig:
        if self.variant == "meta" and (self.judge, self.judge_mode) != ("self", "rubric"):
            raise ValueError("variant is meta, which trains the policy's own rubric judge; use judge self")
        if self.variant == "meta" and self.judge_panel:
            raise ValueError(
                f"judge_panel is {', '.join(self.judge_panel)}, but variant is meta, which trains the "
                "policy's own rubric judge; leave judge_panel out"
            )
        if self.variant == "meta" and (self.learn == "positives" or self.judge_samples < 2):
            raise ValueError("variant is meta, which needs learn pairs and judge_samples of at least 2")
        return self

    @model_validator(mode="after")
    def _uses_its_options(self) -> SelfRewardingConfig:
        untaught = self.ift is None and self.eft is None
        idle = (
            (self.learn == "pairs", "positive_score", "learn is pairs; use learn positives"),
            (self.learn == "positives", "length_tier tie beta", "learn is positives; use learn pairs"),
            (self.variant == "self", "meta_rounds", "variant is self; use variant meta"),
            (self.new_prompts is None, "new_prompt_tokens", "nothing writes new prompts; set new_prompts"),
            (untaught, "sft_epochs sft_lr", "there are no lessons for M1; set ift or eft"),
            (self.judge_data is None, "judge_gap", "nothing measures the judge; set judge_data"),
        )
        for is_idle, names, why in idle:
            for name in names.split():
                if is_idle and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is set, but {why} or leave {name} out")
        return self

    @property
    def perfect(self) -> float:
        """The highest score of the judge."""
        return 5.0 if self.judge_mode == "rubric" else 1.0

    @property
    def pair_rule(self) -> select.Rule:
        """The rule that makes a pair of a group."""
        if self.length_tier is None:
            return partial(select.best_vs_worst, tie=self.tie)
        return partial(select.tiered, width=self.length_tier, tie=self.tie)


def self_rewarding(
    policy: Policy, annotate: Annotator, prompts: Sequence[Prompt], cfg: SelfRewardingConfig, run: Run
) -> None:
    """Train `policy` in place on its own grades of its own completions."""
    lessons = loops.read_lessons(policy, (cfg.ift, cfg.eft), cfg, run)
    ranked = loops.read_ranked(policy, cfg.judge_data, cfg, run, lessons, gap=cfg.judge_gap)
    loops.check_room(annotate, meta=cfg.variant == "meta")
    measure = partial(loops.measure_judge, annotate, ranked, cfg.judge_gap, run, perfect=cfg.perfect)

    measure()  # M_0
    if lessons:
        loops.fine_tune(policy, lessons, cfg.sft_epochs, cfg.sft_lr, cfg, run)  # M_1
        measure()
    seen = [*(group.prompt for _, group in ranked), *loops.held_out_prompts(cfg)]
    writing: Any = {"writer": cfg.new_prompts, "tokens": cfg.new_prompt_tokens}
    prompts_of = loops.prompt_source(policy, prompts, lessons, seen, cfg, run, **writing)

    for t in range(cfg.rounds):
        now = policy.snapshot()  # M_t
        groups = now.sample(prompts_of(t), cfg.n, cfg.sampling, seed=run.seed("sample", t))
        groups = loops.judged_groups(annotate, groups, f"round {t + 1}")
        if cfg.learn == "pairs":
            pairs, numbers = loops.some_pairs(groups, cfg.pair_rule, t, tie=cfg.tie)
            if cfg.variant == "meta" and t < cfg.meta_rounds:
                gradings, meta = loops.judge_pairs(groups, policy, annotate)
                pairs, numbers = [*pairs, *gradings], {**numbers, **meta}
            objective = learn.Pairwise(losses.PAIR_LOSSES["dpo"], cfg.beta, learn.CachedReference(now))
            policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)), lr=cfg.lr)
            each = loops.always(objective)
            loops.fit(policy, pairs, each, cfg, run, name=f"round {t}", numbers=numbers)  # M_t+1
            del each, objective
        else:
            examples, numbers = loops.positives(groups, cfg.positive_score, t)
            policy.optimizer.restart(total_steps=cfg.total_steps(len(examples)), lr=cfg.lr)
            loops.fit(policy, examples, loops.likelihood, cfg, run, name=f"round {t}", numbers=numbers)
        measure()
        loops.contest(now, policy, run)
        del now  # it would keep a copy of the weights alive


def _summary(policy: Policy, run: Run, held_out: Sequence[Prompt]) -> dict[str, float]:
    """Return the judge's agreement with ranked answers before and after training."""
    rows = [row for row in run.measured if "eval_judge/pairs" in row]
    if not rows:
        return {}
    figures = {
        "judge_accuracy_before": rows[0].get("eval_judge/pairwise"),
        "judge_accuracy_after": rows[-1].get("eval_judge/pairwise"),
        "judge_accuracy_low": rows[-1].get("eval_judge/pairwise_low"),
        "judge_accuracy_high": rows[-1].get("eval_judge/pairwise_high"),
        "judge_unclear_before": rows[0].get("eval_judge/unclear"),
        "judge_unclear_after": rows[-1].get("eval_judge/unclear"),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def spends(cfg: SelfRewardingConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending; `rows.others` counts the demonstrations and gradings."""
    prompts = loops.prompts_each_round(cfg, rows)
    total = Spending()
    if rows.others:
        lessons = loops.Batches.model_validate({"batch_size": cfg.batch_size, "epochs": cfg.sft_epochs})
        total += learnt(lessons.total_steps(rows.others), cfg.batch_size, 1)
    if cfg.new_prompts is not None:
        prompts = cfg.prompts_per_round or rows.records
        total += Spending(replies=cfg.rounds * loops.most_replies(prompts))
    for t in range(cfg.rounds):
        meta = cfg.variant == "meta" and t < cfg.meta_rounds
        records = 2 * prompts if meta else prompts
        pairs = cfg.learn == "pairs"
        total += drawn(prompts, cfg.n)
        total += learnt(
            cfg.total_steps(records), cfg.batch_size, 1 + pairs, referenced=2 * records if pairs else 0
        )
        if rows.held_out:  # the contest of the round
            restricted = cfg.sampling != cfg.sampling.unrestricted
            total += drawn((2 + restricted) * rows.held_out, 1, size=0)
            total += Spending(annotations=(Annotations(rows.held_out, 2),), referenced=2 * rows.held_out)
        if meta:
            total += Spending(questions=prompts * cfg.judge_samples * (cfg.judge_samples - 1))
    return total


METHOD = Method(
    train=self_rewarding,
    config=SelfRewardingConfig,
    summary="grades its own completions, and learns from the best and the worst, in rounds",
    paper="Yuan et al. 2024, arXiv:2401.10020",
    group="online",
    learns_from="prompts",
    spends=spends,
    recipe=Recipe("human seed", "current", "each round", ("policy", "reference"), ("policy",)),
    summarise=_summary,
    # It learns from its own grades, whatever the annotator of the comparison is.
    share=Share("each round", rounds=2, fixed={"reward": (), "judge": "self", "judge_mode": "rubric"}),
)
