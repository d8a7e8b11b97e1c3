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
from palate.journal import key_of
from palate.learn import Policy
from palate.methods import METHODS, Method
from palate.model import Snapshot
from palate.run import Display, Run
from palate.types import Pair, Prompt


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
    annotate = run.annotator(_annotator(cfg))
    run.require_same("the prompts", key_of([_facts(p) for p in (*prompts, *held_out)]), "the data")
    policy = _policy(cfg, run, cfg.steps)
    for prompt in (*prompts, *held_out):
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
    base = policy.snapshot()
    method.train(policy, annotate, prompts, cfg, run)
    return _finish(policy, base, held_out, annotate, cfg, run)


def _from_pairs(method: Method, cfg: Any, run: Run) -> Outcome:
    annotate = run.annotator(_annotator(cfg)) if cfg.reward else None
    comparisons, same = read_comparisons(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    policy = _policy(cfg, run, cfg.total_steps(len(comparisons)))
    pairs, cut_same = _distinct([policy.model.codec.pair(row) for row in comparisons], cfg.data)
    policy.optimizer.total_steps = cfg.total_steps(len(pairs))  # without the pairs that are left out
    held_out: list[Pair] = []
    if cfg.eval_data is not None:
        rows, _ = read_comparisons(cfg.eval_data, split=cfg.eval_split, columns=cfg.map, limit=cfg.eval_limit)
        held_out, _ = _distinct([policy.model.codec.pair(row) for row in rows], cfg.eval_data)
    run.require_same("the pairs", key_of([_facts(p) for p in (*pairs, *held_out)]), "the data")
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
    checkpoint = run.save(policy)
    evaluation = None
    summary: dict[str, Any] = {"method": run.method, "steps": policy.version, **numbers}
    if prompts and annotate is not None:
        run.observe("evaluate")
        evaluation = compare(
            base, policy.snapshot(), prompts, annotate, cfg.part(Sampling), seed=run.seed("evaluate")
        )
        summary |= evaluation.summary()
    summary |= {"seconds": round(run.seconds, 1), "checkpoint": str(checkpoint.relative_to(run.directory))}
    summary = run.finish(summary, evaluation.samples() if evaluation is not None else ())
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
    run.attach(policy)
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


def _facts(item: Prompt | Pair) -> list[Any]:
    """What tells one item of the data from another: content, and the columns that a reward may read."""
    prompt = item if isinstance(item, Prompt) else item.prompt
    texts = [] if isinstance(item, Prompt) else [c.token_ids for c in item.completions]
    return [prompt.id, dict(prompt.columns), texts]


def _distinct(pairs: Sequence[Pair], source: str) -> tuple[list[Pair], int]:
    """Without the pairs that have become equal by being cut to the context."""
    kept = [pair for pair in pairs if pair.chosen.token_ids != pair.rejected.token_ids]
    if not kept:
        raise DataError(
            f"{source}: cut to the model's context, chosen and rejected are the same in every pair"
        )
    return kept, len(pairs) - len(kept)
