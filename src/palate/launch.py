"""From a method's name and configuration to a finished run: what `palate run` and `palate.train` do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from palate.annotate import Annotator, annotator
from palate.config import MethodConfig, ModelConfig, RewardConfig, Sampling
from palate.data import read_comparisons, read_prompts
from palate.errors import ConfigError, DataError
from palate.evaluate import Evaluation, compare, wilson
from palate.learn import Policy
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.run import Display, Run
from palate.types import Group, Pair, Prompt

SAID = 5
"""Prompts named for having no usable reward; the rest is counted in `objective/unusable`."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    run: Run
    policy: Policy
    summary: dict[str, Any]
    evaluation: Evaluation | None


def train(method: str, cfg: MethodConfig, *, display: Display | None = None) -> Outcome:
    """Do a whole run: load, measure, train, save, measure again.

    Args:
        method: name of a method, as in `palate methods`.
        cfg: its configuration, of the class `METHODS[method].config`.
        display: where progress is shown.

    Raises:
        PalateError: something that the user can mend; the text says what.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is unknown; there are {', '.join(METHODS)}")
    chosen = METHODS[method]
    if not isinstance(cfg, chosen.config):
        raise ConfigError(f"{method} takes a {chosen.config.__name__}, got a {type(cfg).__name__}")
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    with Run(cfg, method=method, display=display) as run:
        return _PROCEDURES[chosen.learns_from](chosen, cfg, run)


def _from_prompts(method: Method, cfg: Any, run: Run) -> Outcome:
    prompts = read_prompts(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    held_out = _held_out_prompts(cfg)
    annotate = _observed(_annotator(cfg), run)
    policy = _policy(cfg, run, cfg.steps)
    for prompt in (*prompts, *held_out):
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
    base = policy.snapshot()
    method.train(policy, annotate, prompts, cfg, run)
    return _finish(policy, base, held_out, annotate, cfg, run)


def _from_pairs(method: Method, cfg: Any, run: Run) -> Outcome:
    annotate = _observed(_annotator(cfg), run) if cfg.reward else None
    comparisons, same = read_comparisons(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    policy = _policy(cfg, run, cfg.total_steps(len(comparisons)))
    pairs, cut_same = _distinct([policy.model.codec.pair(row) for row in comparisons], cfg.data)
    policy.optimizer.total_steps = cfg.total_steps(len(pairs))  # without the pairs that are left out
    held_out: list[Pair] = []
    if cfg.eval_data is not None:
        rows, _ = read_comparisons(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)
        held_out, _ = _distinct([policy.model.codec.pair(row) for row in rows], cfg.eval_data)
    if same + cut_same:
        run.display.say(f"left out {same + cut_same} pairs in which chosen and rejected are the same")
    prompts = list({pair.prompt.id: pair.prompt for pair in held_out}.values())
    for prompt in prompts if annotate is not None else ():
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
    base = policy.snapshot()
    method.train(policy, pairs, cfg, run, held_out=held_out)
    counts = {"pairs": len(pairs), "pairs_dropped": same + cut_same}
    return _finish(policy, base, prompts, annotate, cfg, run, counts | _accuracies(run, held_out))


_PROCEDURES = {"prompts": _from_prompts, "pairs": _from_pairs}


def _finish(
    policy: Policy,
    base: Snapshot,
    prompts: Sequence[Prompt],
    annotate: Annotator | None,
    cfg: Any,
    run: Run,
    numbers: Mapping[str, float] = MappingProxyType({}),
) -> Outcome:
    """Save first, then measure: a failing reward must not cost the training."""
    checkpoint = run.save(policy, policy.version)
    evaluation = None
    summary: dict[str, Any] = {"method": run.method, "steps": policy.version, **numbers}
    if prompts and annotate is not None:
        run.observe("evaluate")
        evaluation = compare(
            base, policy.snapshot(), prompts, annotate, cfg.part(Sampling), seed=run.seed("evaluate")
        )
        summary |= evaluation.summary()
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint.relative_to(run.directory))}
    run.finish(summary)
    return Outcome(run, policy, summary, evaluation)


def _accuracies(run: Run, held_out: Sequence[Pair]) -> dict[str, float]:
    """Share of the held-out pairs ranked rightly by the implicit reward, at the start and at the end.

    The interval takes prompts for trials: several pairs of one prompt say less than pairs of several.
    """
    if not run.measured:
        return {}
    before, after = (run.measured[i]["eval_rewards/accuracies"] for i in (0, -1))
    low, high = wilson(after, len({pair.prompt.id for pair in held_out}))
    return {
        "held_out_pairs": len(held_out),
        "accuracy_before": before,
        "accuracy_after": after,
        "accuracy_low": low,
        "accuracy_high": high,
    }


def _policy(cfg: MethodConfig, run: Run, steps: int) -> Policy:
    policy = Policy.load(cfg, total_steps=steps, seed=run.seed("adapter"))
    policy.observe = run.observe
    return policy


def _held_out_prompts(cfg: Any) -> list[Prompt]:
    if cfg.eval_data is None:
        return []
    return read_prompts(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)


def _annotator(cfg: RewardConfig) -> Annotator:
    options = (
        {}
        if not isinstance(cfg, ModelConfig)
        else {"device": cfg.device, "trust_remote_code": cfg.trust_remote_code}
    )
    return annotator(cfg.reward, missing_eos_penalty=cfg.missing_eos_penalty, **options)


def _observed(annotate: Annotator, run: Run) -> Annotator:
    said: set[str] = set()

    def wrapped(groups: Sequence[Group]) -> list[Group]:
        found = annotate(groups)
        run.observe("annotate", sum(len(group.completions) for group in groups))
        for group in found:
            unusable = sum(reward is None for reward in group.rewards or ())
            if unusable and len(said) < SAID and group.prompt.id not in said:
                said.add(group.prompt.id)
                run.display.say(
                    f"no usable reward for {unusable} of {len(group.completions)} completions of "
                    f"{group.prompt.text[:60]!r} {group.prompt.where}: left out"
                )
        return found

    return wrapped


def _distinct(pairs: Sequence[Pair], source: str) -> tuple[list[Pair], int]:
    """Without the pairs that have become equal by being cut to the context."""
    kept = [pair for pair in pairs if pair.chosen.token_ids != pair.rejected.token_ids]
    if not kept:
        raise DataError(
            f"{source}: cut to the model's context, chosen and rejected are the same in every pair"
        )
    return kept, len(pairs) - len(kept)
