"""The arms of a comparison: each method with its settings and its share of the budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from palate.arguments import method_named
from palate.comparison.config import SET_BY_BUDGET, SET_FOR_ALL, CompareConfig
from palate.config import JudgeConfig, RewardConfig
from palate.errors import ConfigError
from palate.method import Method
from palate.methods import METHODS
from palate.recipe import Share, Spent
from palate.settings import load_config, offered, read_values

BASE = "before training"
"""Name of the model that all methods start from, in tables."""

PAIR = 4
"""Completions behind one record of an optimizer step, by which steps follow from completions."""


@dataclass(frozen=True)
class Arm:
    """One method in a comparison.

    Attributes:
        name: name in the tables.
        method: the method.
        file: values of its own configuration file, without those that are the same for all methods.
        unused: names of the values that were left out.
        share: how it spends, with the numbers that its options give.
        lr: the learning rate that tuning chose; None for the method's own.
    """

    name: str
    method: Method
    file: Mapping[str, Any]
    share: Share
    unused: tuple[str, ...] = ()
    lr: float | None = None

    @property
    def asks_reward_model(self) -> bool:
        """True if the method's recipe has a reward model, in either form, and the run does not train it."""
        recipe = self.method.recipe
        return not self.share.labelled and "reward model" in (*recipe.networks, *(recipe.alternative or ()))


@dataclass(frozen=True)
class Budget:
    """The share of every method: `completions` for n completions of a prompt, and optimizer steps."""

    unit: str
    amount: float
    batch_size: int
    pairwise: bool
    mean_tokens: float = math.nan
    """Mean tokens of the base model's completions."""
    verdict_cost: float = math.nan
    """Dollars of one question to the annotator."""
    facts: Mapping[str, float] = field(default_factory=dict)

    def completions(self, share: Share, n: int) -> int:
        """Return the completions that a method may sample, its pool's included, with n for each prompt."""
        match self.unit:
            case "prompts":
                return int(self.amount) * (share.n + share.own * share.rounds)
            case "tokens":
                return int(self.amount / self.mean_tokens)
            case "steps":
                return int(self.amount) * self.batch_size * PAIR
            case _:
                verdicts = self.amount / self.verdict_cost if self.unit == "cost" else self.amount
                # A pairwise judge answers two questions for each pair of a prompt's completions.
                return int(verdicts / max(1, n - 1) if self.pairwise else verdicts)

    @property
    def steps(self) -> int:
        """The number of optimizer steps of every method."""
        if self.unit == "steps":
            return int(self.amount)
        usual = Share("pairs", n=PAIR)
        return max(1, self.completions(usual, PAIR) // (PAIR * self.batch_size))


def arms_of(cfg: CompareConfig) -> list[Arm]:
    """Return the arms that `methods` names.

    Raises:
        ConfigError: a method is unknown or cannot be compared, a name is given twice, or a file is wrong.
    """
    arms = [_arm(text, cfg.passed) for text in cfg.methods]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"methods names {name} twice; give one a name of its own, as other={name}")
    return arms


def _arm(text: str, passed: Mapping[str, Any]) -> Arm:
    label, _, rest = text.strip().rpartition("=")
    word, colon, file = rest.partition(":")
    method = method_named(word, METHODS)
    if method.share is None:
        able = ", ".join(name for name, other in METHODS.items() if other.share is not None)
        raise ConfigError(f"{word} does not declare how it spends a budget; methods that do are {able}")
    values = read_values(method.options, Path(file)) if colon else {}
    share = method.share
    if "n" in values and share.when in ("once", "each round", "each step"):
        share = replace(share, n=_count(values["n"], "n", file))
    if "rounds" in values and share.when == "each round":
        share = replace(share, rounds=_count(values["rounds"], "rounds", file))
    if share.epochs_of is not None:
        share = replace(share, epochs=share.epochs_of({**passed, **values}))
    name = label or (Path(file).stem if colon else word)
    if name in (".", "..") or "/" in name:  # it names the directories of its runs
        raise ConfigError(
            f"the name {name!r} contains a path; give the method a plain name, as in strong={word}"
        )
    if name == BASE:
        raise ConfigError(f"{BASE!r} names the model that all methods start from; use another name")
    own = {key: value for key, value in values.items() if key not in SET_FOR_ALL}
    return Arm(name, method, own, share, tuple(sorted(values.keys() - own.keys())))


def _count(value: object, name: str, file: str) -> int:
    text = str(value)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name} is {text!r} in {file}, expected a whole number of at least 1")
    return int(text)


def spent(arm: Arm, budget: Budget, prompts: int) -> Spent:
    """Return the settings of an arm's share.

    Raises:
        ConfigError: the budget is too small for the method.
    """
    try:
        return arm.share.spent(partial(budget.completions, arm.share), budget.steps, prompts)
    except ValueError as error:
        raise ConfigError(
            f"the budget of {budget.amount:g} {budget.unit} is too small for {arm.name}: {error}; raise it, "
            "or leave the method out"
        ) from None


def lacking(arms: Sequence[Arm], cfg: CompareConfig) -> list[str]:
    """Return a sentence for each option that has no effect on a method, passed or in the method's file."""
    sentences = [
        f"{', '.join(arm.unused)} of the file of {arm.name} {'have' if len(arm.unused) > 1 else 'has'} no "
        "effect: a comparison sets the same for all methods"
        for arm in arms
        if arm.unused
    ]
    for name in cfg.passed:
        without = [arm.name for arm in arms if name not in offered(arm.method.config)]
        if without:
            sentences.append(
                f"--{name.replace('_', '-')} has no effect on {', '.join(without)}, which lack it"
            )
    return sentences


def settings_of(
    arm: Arm, cfg: CompareConfig, share: Spent, *, seed: int, data: Path, model: str, reward: Sequence[str]
) -> dict[str, Any]:
    """Return the values of an arm's configuration file for one seed, checked by the method.

    Raises:
        ConfigError: a value is wrong for the method.
    """
    known = offered(arm.method.config)
    steps = int(share.settings["steps"])
    stages = arm.share.rounds * arm.share.stages
    common: dict[str, Any] = {
        "model": model,
        "batch_size": cfg.batch_size,
        "max_new_tokens": cfg.max_new_tokens,
        "temperature": cfg.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "reward": list(reward) or None,
        "device": cfg.device,
        "dtype": cfg.dtype,
        "fresh_prompts": 0,
        # The probing questions to a judge before a run are in no budget.
        "probe_pairs": 0 if cfg.passed.get("judge") else None,
        "checkpoint_every": max(1, steps // max(1, math.ceil(cfg.points / stages))),
        "keep_checkpoints": 1000,
        "lr": cfg.lr,
    }
    passed = cfg.passed
    if cfg.learnt_reward and arm.asks_reward_model:  # the reward model takes the place of the judge
        passed = {name: value for name, value in passed.items() if name not in JudgeConfig.model_fields}
        common["probe_pairs"] = None
    values = {**common, **passed, **arm.file, **({"lr": arm.lr} if arm.lr is not None else {})}
    values |= {**share.settings, "data": str(data), "seed": seed}
    for name in ("map", "split", "eval_data", "output"):
        values.pop(name, None)
    # A method that learns from the pool asks no annotator itself, except to choose its best checkpoint.
    if share.pool_n and values.get("keep") != "best":
        values = {name: value for name, value in values.items() if name not in RewardConfig.model_fields}
    values = {name: value for name, value in values.items() if name in known and value is not None}
    load_config(arm.method.options, file=None, flags=values, choose=arm.method.choose, python=True)
    return values


__all__ = ["BASE", "SET_BY_BUDGET", "Arm", "Budget", "arms_of", "lacking", "settings_of", "spent"]
