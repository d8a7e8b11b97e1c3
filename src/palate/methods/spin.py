"""Self-play fine-tuning (Chen et al. 2024, arXiv:2401.01335, Algorithm 1).

Given demonstrations, the policy plays against itself of the previous round. Each round freezes the policy as
opponent, samples its answers to the demonstrations' prompts, and fits the policy with a pairwise loss: the
demonstration is chosen, the opponent's answer is rejected, and the opponent is the reference (Eq. 4.7). No
preference labels are needed. Training converges when the policy's answers match the data.

Ours: as in the paper, a round also learns from the answers of the previous round; `past_rounds` sets the
number of earlier rounds. Answers equal to the demonstration are dropped and counted; AdamW instead of
RMSprop, with moments reset in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from palate import learn, loops, losses, select
from palate.errors import RunError
from palate.method import Method, Recipe, Share
from palate.spending import Rows, Spending, drawn, learnt
from palate.types import Example, Group, Pair

if TYPE_CHECKING:
    from palate.learn import Policy
    from palate.model import Snapshot
    from palate.run import Run


class SPINConfig(loops.OfflineConfig, loops.PairBatches):
    """Options of SPIN; the defaults of rounds, epochs, beta and past_rounds are the paper's."""

    vetted_lr: ClassVar = {"lora": 1e-4, "full": 1e-5}
    may_change_bits: ClassVar = loops.RoundsConfig.may_change_bits
    may_grow: ClassVar = loops.RoundsConfig.may_grow

    rounds: int = Field(4, ge=1)
    """Number of rounds, each with a new opponent; epochs and steps count for each round."""
    epochs: float = Field(2.0, gt=0)
    """Number of passes over the pairs of a round."""
    loss: Literal["dpo", "hinge_norm"] = "dpo"
    """Loss on a pair: logistic (`dpo`, the paper's) or hinge (`hinge_norm`)."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL constraint to the opponent: higher stays closer (the paper's lambda)."""
    last_beta: float | None = Field(None, gt=0)
    """Beta of the last round; default: `beta`. The paper uses 5.0, its code 0.1."""
    late_lr: float | None = Field(None, gt=0)
    """Peak learning rate from the third round on; default: `lr`. The paper uses `lr`/5."""
    past_rounds: int = Field(1, ge=0)
    """Number of earlier rounds whose answers are trained on again, in addition to the current round's."""


def spin(
    policy: Policy,
    examples: Sequence[Example],
    cfg: SPINConfig,
    run: Run,
    *,
    held_out: Sequence[Example] = (),
) -> None:
    """Train `policy` in place against its own answers of the previous round."""
    loops.warn_of_long_texts([example.completion for example in examples], cfg.max_new_tokens, run)
    rounds: list[list[Pair]] = []
    for t in range(cfg.rounds):
        opponent = policy.snapshot()  # p_theta_t, also the reference
        groups = _answered(opponent, examples, cfg, run.seed("sample", t))  # y' ~ p_theta_t
        rounds = [*rounds, against(examples, groups)][-1 - cfg.past_rounds :]
        pairs = [pair for part in rounds for pair in part]
        if not pairs:
            raise RunError(
                f"round {t + 1} has nothing to learn from: all {len(examples)} answers equal their "
                "demonstrations; raise --temperature or use fewer --rounds"
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
        del each, objective, opponent  # they would keep a copy of the weights alive


def against(examples: Sequence[Example], groups: Sequence[Group]) -> list[Pair]:
    """Return pairs of a demonstration (chosen) and a sampled answer (rejected), without identical pairs."""
    pairs = [Pair(e.prompt, e.completion, g.completions[0]) for e, g in zip(examples, groups, strict=True)]
    return [pair for pair in pairs if not select.same(pair.chosen, pair.rejected)]


def _answered(opponent: Snapshot, examples: Sequence[Example], cfg: SPINConfig, seed: int) -> list[Group]:
    return opponent.sample([e.prompt for e in examples], 1, cfg.sampling, seed=seed) if examples else []


def _summary(policy: Policy, run: Run, held_out: Sequence[Example]) -> dict[str, float]:
    """Return held-out log-probabilities before and after; an accuracy would describe only one round."""
    logps = [row["eval_logps/chosen"] for row in run.measured if "eval_logps/chosen" in row]
    if not logps:
        return {}
    return {"held_out": len(held_out), "held_out_logps_before": logps[0], "held_out_logps_after": logps[-1]}


def spends(cfg: SPINConfig, rows: Rows) -> Spending:
    """Return the upper bounds of the spending."""
    total = Spending()
    for t in range(cfg.rounds):
        pairs = min(t, cfg.past_rounds) * rows.records + rows.records
        steps = cfg.total_steps(pairs)
        total += drawn(rows.records + rows.held_out, 1, size=0)
        total += learnt(steps, cfg.batch_size, 2, referenced=2 * (pairs + rows.held_out))
    return total


METHOD = Method(
    train=spin,
    config=SPINConfig,
    summary="self-play: prefers demonstrations over the policy's own answers of the previous round",
    paper="Chen et al. 2024, arXiv:2401.01335",
    group="offline",
    learns_from="demonstrations",
    spends=spends,
    recipe=Recipe("none", "mixed", "each round", ("policy", "reference"), ("policy",)),
    summarise=_summary,
    share=Share("demonstrations", n=16, rounds=2, own=1),
)
