"""The spending of the loops that several methods share; see `palate.spending`."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from typing import Any

from palate.loops.config import Batches, Pairing, PairRounds, RoundsConfig
from palate.loops.rl_config import LearntReward, PolicyGradients
from palate.spending import Annotations, Rows, Spending, drawn, learnt


def spends_on_pairs(cfg: Batches, rows: Rows) -> Spending:
    """Return the spending on fixed pairs with a reference."""
    return learnt(cfg.total_steps(rows.records), cfg.batch_size, 2, referenced=2 * rows.records)


def spends_on_pairs_alone(cfg: Batches, rows: Rows) -> Spending:
    """Return the spending on fixed pairs without a reference."""
    return learnt(cfg.total_steps(rows.records), cfg.batch_size, 2)


def spends_on_demonstrations(cfg: Batches, rows: Rows) -> Spending:
    """Return the spending on demonstrations."""
    return learnt(cfg.total_steps(rows.records), cfg.batch_size, 1)


def spends_each_step(cfg: Any, rows: Rows) -> Spending:
    """Return the spending of a method that samples in every step and learns one pair per prompt."""
    groups = cfg.steps * cfg.batch_size
    return drawn(groups, cfg.n) + learnt(cfg.steps, cfg.batch_size, 2, referenced=2 * groups)


def spends_on_policy_gradients(cfg: PolicyGradients, rows: Rows) -> Spending:
    """Return the spending of a method with rollout phases, its mean reward at the start included.

    Every phase counts in full, also those of `value_warmup`, in which only the value function learns.
    """
    groups = cfg.steps * cfg.batch_size
    spending = drawn(groups, cfg.n) + Spending(
        steps=cfg.steps * cfg.updates,
        learned=groups * cfg.n * cfg.ppo_epochs + _pretraining(cfg),
        referenced=groups * cfg.n,
    )
    if cfg.centre_on == "start":
        n = 1 if cfg.judge is None else cfg.n
        return _early(drawn(min(rows.distinct, cfg.centre_prompts), n)) + spending
    if cfg.centre_on != "none":
        return drawn(cfg.centre_prompts, 0, size=1) + spending
    return spending


def spends_on_learnt_reward(cfg: LearntReward, rows: Rows) -> Spending:
    """Return the spending of a reward model from preferences, and of policy gradients on its rewards.

    `rows.others` counts the rows of `cfg.pairs`.
    """
    available = rows.distinct if cfg.pairs is None else rows.others
    prompts = min(cfg.preference_prompts or available, available)
    each = comb(cfg.candidates, 2)
    sampled = _early(drawn(prompts, cfg.candidates, size=0)) if cfg.pairs is None else Spending()
    labels = Spending(annotations=(Annotations(prompts * each, 2),))
    learning = (prompts - int(cfg.preference_held_out * prompts)) * each
    reward = learnt(cfg.reward_total_steps(learning), cfg.reward_batch_size, 2)
    gradients = spends_on_policy_gradients(cfg, rows)
    own = replace(gradients, annotations=(), referenced=gradients.referenced + gradients.scored)
    return sampled + labels + reward + own


def _early(spending: Spending) -> Spending:
    return replace(spending, early=spending.sampled)


def _pretraining(cfg: PolicyGradients) -> int:
    return cfg.steps * cfg.updates * cfg.pretrain_batch_size if cfg.pretrain_data is not None else 0


def prompts_each_round(cfg: RoundsConfig, rows: Rows) -> int:
    """Return the most prompts that a round samples for."""
    return rows.distinct if cfg.prompts_per_round is None else min(rows.distinct, cfg.prompts_per_round)


def spends_on_pair_rounds(cfg: PairRounds, rows: Rows, *, reference: bool = False) -> Spending:
    """Return the spending of rounds of one pair per prompt; `rows.others` counts the pairs of the data.

    Args:
        cfg, rows: the configuration and its data.
        reference: the method has a reference.
    """
    prompts, total = prompts_each_round(cfg, rows), Spending()
    for t in range(cfg.rounds):
        samples = cfg.pairs is None or t > 0
        pairs = (prompts if samples else 0) + (rows.others if cfg.mix_pairs or not samples else 0)
        if samples:
            total += drawn(prompts, cfg.n, size=cfg.n if cfg.label == "annotator" else 0)
        implicit = 2 * cfg.n * prompts if samples and cfg.label == "implicit" else 0
        referenced = 2 * pairs * reference + implicit
        total += learnt(cfg.total_steps(pairs), cfg.batch_size, 2, referenced=referenced)
    return total


def pairs_of_candidates(pairing: Pairing, count: int) -> int:
    """Return the most pairs that a rule forms of `count` candidates."""
    most: dict[Pairing, int] = {
        "tournament": count - 1,
        "first-round": count // 2,
        "drawn": min(count, count * (count - 1) // 2),
        "best-vs-worst": 1,
    }
    return most[pairing]
