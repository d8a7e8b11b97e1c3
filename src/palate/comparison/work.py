"""The work of `palate compare`: shared parts, tuning, runs, measurements, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from palate.comparison.arms import BASE, Arm, Budget, arms_of, lacking, settings_of, spent
from palate.comparison.config import CompareConfig
from palate.comparison.measure import Measured, Meter, measure, measuring
from palate.comparison.results import results
from palate.comparison.runs import Job, train_all
from palate.comparison.shared import (
    Pool,
    Prompts,
    facts_of,
    keep_json,
    measured_budget,
    pool_run,
    pools,
    read_all,
    write_training,
)
from palate.errors import RunError
from palate.quiet import quieted
from palate.recipe import Spent
from palate.run import Display

TUNING_SEED = 1000
"""Seed of all tuning runs, so that the runs of the comparison use other seeds."""


@dataclass(frozen=True)
class Compared:
    """A finished comparison: the numbers of `summary.json`, samples side by side, and sentences to print."""

    directory: Path
    result: dict[str, Any]
    samples: list[dict[str, Any]]


def compare_methods(cfg: CompareConfig, *, display: Display | None = None) -> Compared:
    """Train every method with every seed on an equal share, measure all runs, and write `summary.json`.

    The same call again resumes: finished runs and measurements are kept. Methods and seeds can be added.

    Raises:
        PalateError: a mistake that the user can correct, or a run that failed; the message says how.
    """
    shown = display or Display(quiet=True)
    arms = arms_of(cfg)
    for sentence in lacking(arms, cfg):
        shown.say(sentence)
    with quieted():
        _make_directory(cfg.output)
        prompts = read_all(cfg, shown.say)
        _require_same(cfg, prompts, arms)
        write_training(prompts)
        model = _starting_model(cfg, shown)
        with pool_run(cfg, model, shown) as opening:
            budget = measured_budget(cfg, *opening, prompts)
            shares = {arm.name: spent(arm, budget, len(prompts.train)) for arm in arms}
            _check_settings(cfg, arms, shares, prompts, model)
            pooled = pools(cfg, arms, shares, opening, prompts)
            opening[2].finish({"pools": len(pooled)})
        reward, bill = _reward_model(cfg, arms, budget, prompts, model, shown)
        plan = _Plan(cfg, prompts, model, shares, pooled, reward)
        if cfg.tune:
            arms = _tuned(plan, arms, shown)
        jobs = [plan.job(arm, cfg.seed + i) for arm in arms for i in range(cfg.seeds)]
        train_all(jobs, cfg.output, at_once=cfg.jobs, display=shown)
        with measuring(cfg, model, prompts.test, shown) as meter:
            measured = measure(meter, jobs, points=cfg.points)
            result = results(cfg, arms, budget, pooled, bill, meter, measured)
            samples = _samples(meter, measured)
    keep_json(cfg.output / "summary.json", result)
    return Compared(cfg.output, result, samples)


def _make_directory(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if output.is_file() else error.strerror
        raise RunError(
            f"the directory {str(output)!r} cannot be written: {reason}; use another --output"
        ) from None


def _check_settings(
    cfg: CompareConfig, arms: Sequence[Arm], shares: Mapping[str, Spent], prompts: Prompts, model: str
) -> None:
    """Check the settings of every method before the annotator is asked about the pool.

    Raises:
        ConfigError: a value is wrong for a method.
    """
    for arm in arms:
        learnt = cfg.learnt_reward and arm.asks_reward_model
        rewards = [f"model:{_learnt(cfg)}"] if learnt else list(map(str, cfg.reward))
        settings_of(arm, cfg, shares[arm.name], seed=cfg.seed, data=prompts.file, model=model, reward=rewards)


def _learnt(cfg: CompareConfig) -> Path:
    """Return the directory of the shared reward model."""
    return (cfg.output / "shared" / "reward-model").resolve()


@dataclass(frozen=True)
class _Plan:
    """What the runs of a comparison have in common."""

    cfg: CompareConfig
    prompts: Prompts
    model: str
    shares: Mapping[str, Spent]
    pooled: Mapping[str, Pool]
    reward: str | None
    """The trained reward model; None without one."""

    def job(self, arm: Arm, seed: int, *, lr: float | None = None, place: str = "runs") -> Job:
        """Return the run of an arm with a seed."""
        share = self.shares[arm.name]
        data = self.pooled[arm.name].file if arm.name in self.pooled else self.prompts.file
        rewards = [self.reward] if self.reward and arm.asks_reward_model else list(map(str, self.cfg.reward))
        chosen = arm if lr is None else replace(arm, lr=lr)
        values = settings_of(
            chosen, self.cfg, share, seed=seed, data=data.resolve(), model=self.model, reward=rewards
        )
        name = f"{arm.name}-{seed}" if lr is None else f"{arm.name}-lr-{lr:g}"
        return Job(name, arm.name, seed, arm.method.name, values, self.cfg.output / place / name)


def _require_same(cfg: CompareConfig, prompts: Prompts, arms: Sequence[Arm]) -> None:
    """Write the settings of the comparison and its methods, or compare them with those of earlier calls.

    Raises:
        RunError: other settings or other data were used.
    """
    file = cfg.output / "compare.json"
    settings = {k: v for k, v in cfg.model_dump(mode="json").items() if k not in cfg.may_change}
    # As JSON, so that they equal what is read back.
    methods = json.loads(json.dumps({arm.name: [arm.method.name, arm.file] for arm in arms}, default=str))
    now = {"settings": settings, "data": facts_of(prompts), "methods": methods}
    if file.exists():
        try:
            kept = json.loads(file.read_text("utf-8"))
            old, earlier = dict(kept["settings"]), dict(kept["methods"])
        except (ValueError, KeyError, TypeError):
            raise RunError(
                f"{str(file)!r} is damaged, so the settings of the comparison are lost; use another --output"
            ) from None
        changed = _changed(settings, old)
        changed += [
            f"the method or the file of {k}"
            for k in sorted(methods)
            if earlier.get(k, methods[k]) != methods[k]
        ]
        now["methods"] = earlier | methods
        if kept.get("data") != now["data"]:
            changed.append("the prompts in the data")
        if changed:
            raise RunError(
                f"{str(cfg.output)!r} holds a comparison with other settings: {', '.join(changed)}; use the "
                "original ones to resume it, or another --output"
            )
    keep_json(file, now)


def _changed(now: Mapping[str, Any], then: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ; those of `palate run` by their own names."""
    names = sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k))
    if "passed" in names:
        names.remove("passed")
        names += _changed(now.get("passed") or {}, then.get("passed") or {})
    return names


def _starting_model(cfg: CompareConfig, display: Display) -> str:
    """Return the model that all methods start from: the given one, or that after supervised fine-tuning."""
    if cfg.sft is None:
        return cfg.model
    directory = cfg.output / "shared" / "sft"
    values = {
        "model": cfg.model, "data": cfg.sft, "device": cfg.device, "dtype": cfg.dtype, "seed": cfg.seed,
        "fresh_prompts": 0, "max_new_tokens": cfg.max_new_tokens,
    }  # fmt: skip
    train_all(
        [Job("sft", "sft", cfg.seed, "sft", values, directory)],
        cfg.output / "shared",
        at_once=1,
        display=display,
    )
    return str(directory)


def _reward_model(
    cfg: CompareConfig,
    arms: Sequence[Arm],
    budget: Budget,
    prompts: Prompts,
    model: str,
    display: Display,
) -> tuple[str | None, dict[str, float]]:
    """Train the shared reward model on labelled pairs, if it is wanted; return its name and its bill."""
    if not cfg.learnt_reward or not any(arm.asks_reward_model for arm in arms):
        return None, {}
    arm = replace(arms_of(cfg.model_copy(update={"methods": ("dpo",)}))[0], name="reward-model")
    share = spent(arm, budget, len(prompts.train))
    with pool_run(cfg, model, display) as opening:
        pool = pools(cfg, [arm], {arm.name: share}, opening, prompts)[arm.name]
        opening[2].finish({"pools": 1})
    directory = _learnt(cfg)
    values = {
        "model": cfg.model, "data": str(pool.file.resolve()), "device": cfg.device, "dtype": cfg.dtype,
        "seed": cfg.seed,
    }  # fmt: skip
    job = Job("reward-model", "reward-model", cfg.seed, "reward-model", values, directory)
    train_all([job], cfg.output / "shared", at_once=1, display=display)
    bill = {
        "completions": pool.completions,
        "tokens": pool.tokens,
        "verdicts": pool.verdicts,
        "cost": pool.cost,
    }
    return f"model:{directory}", {k: float(v) for k, v in bill.items()}


def _tuned(plan: _Plan, arms: Sequence[Arm], display: Display) -> list[Arm]:
    """Return the arms with the learning rate that has the best mean reward on the validation prompts."""
    cfg = plan.cfg
    rates = {
        arm.name: [float(f"{factor * _own_lr(arm, cfg):.3g}") for factor in cfg.tune_factors] for arm in arms
    }
    trials = {
        (arm.name, lr): plan.job(arm, cfg.seed + TUNING_SEED, lr=lr, place="tuning")
        for arm in arms
        for lr in rates[arm.name]
    }
    diverged = train_all(
        list(trials.values()), cfg.output, at_once=cfg.jobs, display=display, may_diverge=True
    )
    trials = {key: job for key, job in trials.items() if job.name not in diverged}
    with measuring(cfg, plan.model, plan.prompts.validation, display, "tuning/measurements") as meter:
        rows = measure(meter, list(trials.values()), points=1)
    scores = {key: float(np.nanmean(row.rewards)) for key, row in zip(trials, rows, strict=True)}
    chosen = []
    for arm in arms:
        tried = [lr for lr in rates[arm.name] if (arm.name, lr) in scores]
        if not tried:
            raise RunError(
                f"{arm.name} has losses that are not finite at every learning rate of the search; give "
                "smaller --tune-factors"
            )
        best = max(tried, key=lambda lr: scores[arm.name, lr])
        display.say(f"{arm.name}: learning rate {best:g}")
        chosen.append(replace(arm, lr=best))
    measured = {name: {f"{lr:g}": scores.get((name, lr)) for lr in tried} for name, tried in rates.items()}
    kept = {arm.name: {"chosen": arm.lr, "rewards": measured[arm.name]} for arm in chosen}
    keep_json(cfg.output / "tuning.json", kept)
    return chosen


def _own_lr(arm: Arm, cfg: CompareConfig) -> float:
    lora = cfg.passed.get("lora", arm.file.get("lora", True))
    full = lora is False or str(lora).lower() == "false"
    return float(arm.file.get("lr") or cfg.lr or arm.method.config.vetted_lr["full" if full else "lora"])


def _samples(meter: Meter, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Return a row for each test prompt with the base's completion and that of each method's first seed."""
    first = {row.job.arm: row for row in reversed(measured)}
    rows = []
    for i, group in enumerate(meter.base.groups):
        texts = [(BASE, group.completions[0], float(measured[0].base[i]))]
        texts += [
            (name, row.side.groups[i].completions[0], float(row.rewards[i])) for name, row in first.items()
        ]
        outputs = [
            {"name": name, "text": c.text, "reward": reward, "tokens": len(c.token_ids), "finish": c.finish}
            for name, c, reward in texts
        ]
        rows.append({"prompt": group.prompt.text, "outputs": outputs})
    return rows


__all__ = ["Compared", "compare_methods"]
