"""Measurements of a run before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from palate.annotate import Annotator
from palate.config import KLConfig, Rollouts, Sampling
from palate.data import Stream
from palate.errors import ConfigError
from palate.evaluate import Evaluation, compare, kl_from
from palate.learn import Learner, Policy
from palate.loops import fresh_logps
from palate.methods import Method
from palate.model import Snapshot, share_loaded, weight_bytes
from palate.run import Drift, Run
from palate.types import Example, Pair, Prompt

KL_EVERY = 10
"""Steps between measurements of the KL with `max_kl`, unless `kl_every` says otherwise."""


def shown_prompts(
    method: Method,
    learner: Learner,
    held_out: Sequence[Prompt],
    others: Iterable[Prompt],
    cfg: Any,
    *,
    all_held_out: bool,
) -> Sequence[Prompt]:
    """Return the prompts of `measure_fresh`: all held-out prompts if the run compares on them, else a few.

    The list is empty if every step samples from the current policy and logs the same number.
    """
    samples = isinstance(learner, Policy) and isinstance(cfg, Sampling)  # a ranker does not complete prompts
    if not samples or method.recipe.judged == "each step":
        return ()
    if all_held_out:
        return held_out
    return list(islice(fitting_prompts(learner, held_out or others, cfg), cfg.fresh_prompts))


def worth_gathering(learner: Learner, shown: Sequence[Prompt], run: Run) -> Sequence[Prompt]:
    """Return the prompts of `measure_fresh` for a method that samples nothing else.

    The list is empty if the weights are divided among the processes and no server samples: a few completions
    are not worth a copy of all weights on each device, which may not fit.
    """
    if not shown or not learner.model.sharded or learner.model.sampler is not None:
        return shown
    run.display.say(
        "the metric logps/fresh is not measured: the weights are divided among the processes, and sampling "
        "would need a copy of all weights on each device"
    )
    return ()


def fitting_prompts(learner: Learner, prompts: Iterable[Prompt], cfg: Any) -> Iterator[Prompt]:
    """Yield distinct prompts that leave room for a completion, in order."""
    codec = learner.model.codec
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id not in seen:
            seen.add(prompt.id)
            if len(codec.prompt_ids(prompt)) + cfg.max_new_tokens <= codec.max_length:
                yield prompt


def drawn_prompts(
    learner: Learner, prompts: Sequence[Prompt], cfg: Any, count: int, *, seed: int
) -> list[Prompt]:
    """Draw distinct prompts that leave room for a completion; only the first ones that fit are read."""
    shuffled = Stream(prompts, seed=seed).once() if len(prompts) else ()
    return list(islice(fitting_prompts(learner, shuffled, cfg), count))


def watch_kl(
    learner: Learner, prompts: Sequence[Prompt], cfg: Any, run: Run, annotate: Annotator | None
) -> None:
    """Have the run measure KL(policy || start), and the reward if the best checkpoint is kept.

    `KLConfig` says when; the training prompts are drawn once.

    Raises:
        ConfigError: the best checkpoint is to be kept without a reward, or no prompt fits.
    """
    if not isinstance(cfg, KLConfig) or not isinstance(cfg, Sampling) or not isinstance(learner, Policy):
        return
    best = cfg.keep == "best"
    if best and annotate is None:
        raise ConfigError("keep is best, but no reward is given; give a reward or a judge, or keep the last")
    every = cfg.kl_every or (KL_EVERY if best or cfg.max_kl is not None else None)
    if every is None:
        return
    start, sampling = learner.snapshot(), cfg.sampling
    drawn = drawn_prompts(learner, prompts, cfg, cfg.kl_prompts, seed=run.seed("kl prompts"))
    if not drawn:
        raise ConfigError("no training prompt leaves room for max_new_tokens, so the KL cannot be measured")

    def measure(step: int) -> float:
        return kl_from(start, learner.snapshot(), drawn, sampling, seed=run.seed("kl", step))

    def reward(step: int) -> float:
        # Beside the start's completions, because a judge compares completions within a group.
        pairs = zip(
            start.sample(drawn, 1, sampling, seed=run.seed("keep", "start")),
            learner.snapshot().sample(drawn, 1, sampling, seed=run.seed("keep", step)),
            strict=True,
        )
        assert annotate is not None, "checked above"
        groups = annotate([replace(old, completions=old.completions + new.completions) for old, new in pairs])
        rewards = [r for group in groups if (r := (group.rewards or (None, None))[1]) is not None]
        return sum(rewards) / len(rewards) if rewards else -math.inf

    run.drift = Drift(measure, every, cfg.max_kl, reward if best else None)


def keep_best(run: Run, *learners: Learner) -> None:
    """Make the checkpoint with the best measured reward the run's result, if the configuration says so."""
    best = run.checkpoints.restore_best(*learners)
    if best is not None:
        run.display.say(f"the result is the checkpoint of step {best.steps}, which has the best reward")


def hold_contests(held_out: Sequence[Prompt], annotate: Annotator | None, cfg: Any, run: Run) -> None:
    """Let the run compare two policies on the held-out prompts, as methods in rounds do after each round."""
    if not held_out or annotate is None or not isinstance(cfg, Rollouts):
        return

    def contest(before: Snapshot, after: Snapshot) -> dict[str, float]:
        seed = run.seed("contest", after.version)
        outcome = compare(before, after, held_out, annotate, cfg.held_out_sampling, seed=seed)
        return {
            "eval_round_reward": outcome.reward_after,
            "eval_round_reward_before": outcome.reward_before,
            "eval_round_win_rate": outcome.win_rate,
            "eval_round_win_rate_low": outcome.win_rate_low,
            "eval_round_win_rate_high": outcome.win_rate_high,
            "eval_round_kl": outcome.kl,
            "eval_round_length": outcome.length_after,
            "eval_round_length_before": outcome.length_before,
        }

    run.contest = contest


def measure_fresh(
    learner: Learner, prompts: Sequence[Prompt], cfg: Any, run: Run, known: Evaluation | None = None
) -> None:
    """Measure `logps/fresh`: the policy's log-probability of its own samples."""
    if not prompts or not isinstance(learner, Policy):
        return

    def metrics() -> dict[str, float]:
        if known is not None:
            return fresh_logps(known.after)
        # The seed is that of `compare`, which then reads the samples from the journal.
        seed = 2 * run.seed("evaluate")
        return fresh_logps(learner.snapshot().sample(prompts, 1, cfg.held_out_sampling, seed=seed))

    run.measure("fresh", metrics)


def held_out_numbers(learner: Learner, run: Run, held_out: Sequence[Pair | Example]) -> dict[str, float]:
    """Return the first and the last measurement on the held-out records.

    For pairs it is the share of pairs that the implicit reward ranks as the data do, else the loss.
    """
    ranked = [row for row in run.measured if "eval_rewards/accuracies" in row]
    losses = [row["eval_loss"] for row in run.measured if "eval_loss" in row]
    if ranked:
        return {
            "held_out_pairs": len(held_out),
            "accuracy_before": ranked[0]["eval_rewards/accuracies"],
            "accuracy_after": ranked[-1]["eval_rewards/accuracies"],
            "accuracy_low": ranked[-1]["eval_rewards/accuracies_low"],
            "accuracy_high": ranked[-1]["eval_rewards/accuracies_high"],
        }
    if losses:
        return {"held_out": len(held_out), "loss_before": losses[0], "loss_after": losses[-1]}
    return {}


def report_weights(run: Run, policy: Learner, *others: Learner) -> None:
    """Share frozen weights that several models have in common, and show the memory of the learners' weights.

    A reward model with an adapter on the policy's base also drops its copy of the base.
    """
    share_loaded(policy.model)
    if not others:
        return
    models = [learner.model for learner in (policy, *others)]
    apart = sum(weight_bytes(model) for model in models)
    names = " and ".join(learner.name for learner in (policy, *others))
    run.display.say(
        f"weights of {names}: {weight_bytes(*models) / 1e6:,.0f} MB "
        f"({apart / 1e6:,.0f} MB if they shared none)"
    )
