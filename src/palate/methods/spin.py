"""Self-play fine-tuning (Chen et al. 2024, arXiv:2401.01335, Algorithm 1).

Given demonstrations, the policy plays against what it was a round ago. Each round freezes the policy as
opponent, has it answer the demonstrations' prompts, and fits the policy to tell the demonstrations from
those answers: a pairwise loss in which the demonstration is chosen, the opponent's answer rejected, and the
opponent the reference (Eq. 4.7). No one labels preferences; where the policy writes as the data do, there
is nothing left to learn.

Ours: a round learns from the answers of the round before, too, as the paper does, and `past_rounds` sets
of how many; answers equal to the demonstration are left out and counted; AdamW instead of RMSprop, whose
moments begin anew in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses, select
from palate.errors import RunError
from palate.method import Method, Recipe
from palate.types import Example, Group, Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.model import Snapshot
    from palate.run import Run


class SPINConfig(loops.OfflineConfig, loops.PairBatches):
    """Numbers of SPIN; rounds, epochs, beta and what is learnt from default to the paper's."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}
    may_change_bits: ClassVar = loops.RoundsConfig.may_change_bits
    may_grow: ClassVar = loops.RoundsConfig.may_grow

    rounds: int = Field(4, ge=1)
    """Rounds, each with a new opponent; epochs or steps count for each."""
    epochs: float = Field(2.0, gt=0)
    """Passes over the pairs of a round."""
    loss: Literal["dpo", "hinge_norm"] = "dpo"
    """Loss on a pair: logistic, the paper's, or hinge."""
    beta: float = Field(0.1, gt=0)
    """Strength of the pull to the opponent, the paper's lambda."""
    last_beta: float | None = Field(None, gt=0)
    """Beta of the last round, if it is another; the paper has 5.0 there, its code 0.1."""
    late_lr: float | None = Field(None, gt=0)
    """Peak learning rate from the third round on, if it is another; the paper has a fifth there."""
    past_rounds: int = Field(1, ge=0)
    """Earlier rounds whose answers are learnt from, beside those of the present one."""


def spin(
    policy: Policy,
    examples: Sequence[Example],
    cfg: SPINConfig,
    run: Run,
    *,
    held_out: Sequence[Example] = (),
) -> None:
    """Train `policy` in place against what it was a round ago."""
    loops.tell_long_texts([example.completion for example in examples], cfg.max_new_tokens, run)
    rounds: list[list[Pair]] = []
    for t in range(cfg.rounds):
        opponent = policy.snapshot()  # p_theta_t, the reference too
        groups = _answered(opponent, examples, cfg, run.seed("sample", t))  # y' ~ p_theta_t
        rounds = [*rounds, against(examples, groups)][-1 - cfg.past_rounds :]
        pairs = [pair for part in rounds for pair in part]
        if not pairs:
            raise RunError(
                f"round {t + 1} has nothing to learn from: all {len(examples)} answers are the same as the "
                "demonstrations; raise --temperature, or end before with fewer --rounds"
            )
        unseen = against(held_out, _answered(opponent, held_out, cfg, run.seed("held out", t)))
        beta = cfg.last_beta if cfg.last_beta and t + 1 == cfg.rounds else cfg.beta
        objective = learn.Pairwise(losses.PAIR_LOSSES[cfg.loss], beta, learn.CachedReference(opponent))
        lr = cfg.late_lr if cfg.late_lr and t >= 2 else cfg.lr
        policy.optimizer.restart(total_steps=cfg.total_steps(len(pairs)), lr=lr)
        identical = {select.Drop.IDENTICAL: len(groups) - len(rounds[-1])}
        numbers = {"round": t + 1, "beta": beta} | loops.group_numbers(groups, identical, kept=len(pairs))
        each = loops.always(objective)
        loops.fit(policy, pairs, each, cfg, run, unseen, name=f"round {t}", numbers=numbers)
        del each, objective, opponent  # they hold a copy of the weights


def against(examples: Sequence[Example], groups: Sequence[Group]) -> list[Pair]:
    """Return pairs of a demonstration, chosen, and the answer to its prompt, unless the two are the same."""
    pairs = [Pair(e.prompt, e.completion, g.completions[0]) for e, g in zip(examples, groups, strict=True)]
    return [pair for pair in pairs if not select.same(pair.chosen, pair.rejected)]


def _answered(opponent: Snapshot, examples: Sequence[Example], cfg: SPINConfig, seed: int) -> list[Group]:
    return opponent.sample([e.prompt for e in examples], 1, cfg.sampling, seed=seed) if examples else []


def _summary(policy: Policy, run: Run, held_out: Sequence[Example]) -> dict[str, float]:
    """Return held-out log-probabilities before and after; an accuracy describes one round alone."""
    logps = [row["eval_logps/chosen"] for row in run.measured if "eval_logps/chosen" in row]
    if not logps:
        return {}
    return {"held_out": len(held_out), "held_out_logps_before": logps[0], "held_out_logps_after": logps[-1]}


METHOD = Method(
    train=spin,
    config=SPINConfig,
    summary="self-play: tells demonstrations from its own answers of the round before",
    paper="Chen et al. 2024, arXiv:2401.01335",
    group="offline",
    learns_from="demonstrations",
    recipe=Recipe("none", "mixed", "each round", ("policy", "reference"), ("policy",)),
    summarise=_summary,
)
