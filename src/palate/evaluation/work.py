"""The work of `palate evaluate models`: a run that samples every side, annotates pairs and measures."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from palate.annotate import Annotator
from palate.data import Account, read_demonstrations, read_prompts
from palate.evaluation.config import FROM_DATA, EvaluateConfig
from palate.evaluation.numbers import (
    best_numbers,
    finite,
    kl_numbers,
    reward_numbers,
    text_numbers,
    win_numbers,
)
from palate.evaluation.sides import Open, Side, answered, fitting, log_likelihoods, opened, sampled
from palate.journal import key_of
from palate.launch.rewards import annotator_of
from palate.loops.records import tokenized
from palate.model.device import resolve
from palate.quiet import quieted
from palate.run import Display, Run, settle_compiling
from palate.run.seeds import seed_of
from palate.types import Demonstration, Group, Prompt

COSTS = ("judge/verdicts", "judge/tokens", "judge/cost")


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation: its directory, the numbers of `summary.json`, and rows of `samples.jsonl`."""

    directory: Path
    result: dict[str, Any]
    samples: list[dict[str, Any]]


def evaluate(cfg: EvaluateConfig, *, display: Display | None = None) -> Evaluated:
    """Measure models against a baseline, or several models against each other.

    Samples, log-probabilities and verdicts are stored in the journal as they come, so that the same call
    again resumes an interrupted evaluation.

    Raises:
        PalateError: a mistake that the user can correct; the message says how.
    """
    cfg = cfg.model_copy(update={"output": cfg.place})
    with quieted(), Run(cfg, method="evaluate", display=display) as run:
        annotate = annotator_of(cfg.annotating, run, None)  # type: ignore[arg-type]  # reads the reward's part only
        assert annotate is not None, "the configuration requires a reward or a judge"
        sides, baseline, kls = _sides(cfg, run)
        result = _measured(cfg, sides, baseline, kls, annotate)
        result |= {k.replace("/", "_"): v for k, v in run.meter().items() if k in COSTS}
        rows = _rows(cfg, sides, baseline, result.pop("rewards"))
        result |= {"prompts": len(sides[0].groups), "seconds": round(run.seconds, 1)}
        return Evaluated(run.directory, run.finish(finite(result), rows), rows)


# ---- Sides -----------------------------------------------------------------------------------------


def _sides(cfg: EvaluateConfig, run: Run) -> tuple[list[Side], Side | None, dict[str, list[float]]]:
    """Return the models' sides, the baseline's, and the baseline's log-probabilities of each model's own
    completions. One model is in memory at a time.
    """
    account = Account(strict=cfg.strict, max_bad_rows=cfg.max_bad_rows)
    rows: list[Demonstration] = []
    if cfg.against == FROM_DATA:
        rows = read_demonstrations(
            cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit, account=account
        )
        prompts = [row.prompt for row in rows]
    else:
        prompts = read_prompts(cfg.data, split=cfg.split, columns=cfg.map, limit=cfg.limit, account=account)
    most, (device, _) = len(prompts) * cfg.n * cfg.max_new_tokens, resolve(cfg.loading(cfg.model[0]))
    cfg = cfg.model_copy(update={"compile": settle_compiling(run, cfg.compile, device, most)})
    other = cfg.against if cfg.against not in (None, FROM_DATA) else None
    sides: list[Side] = []
    baseline: Side | None = None
    for place, name in enumerate(cfg.model):
        with opened(name, cfg, run) as one:
            if place == 0:
                prompts, rows = _usable(one, prompts, rows, cfg, account)
                account.use(None)
                run.report_data(cfg.data, account)
                run.require_same("the prompts", key_of([prompt.id for prompt in prompts]), "the data")
                baseline = answered(one.codec, rows, cfg.n) if rows else None
            want_kl = cfg.kl and other is not None
            sides.append(sampled(one, name, prompts, cfg, place=place, own=want_kl))
    kls: dict[str, list[float]] = {}
    if other is not None:
        with opened(other, cfg, run) as one:
            baseline = sampled(one, other, prompts, cfg, place=len(sides), own=False)
            for side in sides:
                if side.own and side.vocabulary == one.vocabulary:
                    kls[side.name] = log_likelihoods(one, side.own)
                elif side.own:
                    run.display.say(f"no KL for {side.name}: its vocabulary differs from that of {other}")
    return sides, baseline, kls


def _usable(
    one: Open,
    prompts: Sequence[Prompt],
    rows: Sequence[Demonstration],
    cfg: EvaluateConfig,
    account: Account,
) -> tuple[list[Prompt], list[Demonstration]]:
    """Return the prompts, and the rows with completions if these are compared, that fit the first model."""
    if not rows:
        return fitting(one, prompts, cfg, account), []
    kept: list[Demonstration] = []

    def checked(row: Demonstration) -> Prompt:
        one.codec.room(row.prompt, need=cfg.max_new_tokens)
        one.codec.example(row)
        kept.append(row)
        return row.prompt

    return tokenized(one.codec, rows, cfg.data, account, checked), kept


# ---- Numbers ---------------------------------------------------------------------------------------


def _measured(
    cfg: EvaluateConfig,
    sides: Sequence[Side],
    baseline: Side | None,
    kls: Mapping[str, Sequence[float]],
    annotate: Annotator,
) -> dict[str, Any]:
    """Return all numbers, and under `rewards` the rewards of each side's first completion by prompt."""
    models: list[dict[str, Any]] = []
    rewards: dict[str, list[float | None]] = {}
    against: dict[str, Any] | None = None
    for side in sides:
        numbers: dict[str, Any] = {"name": side.name, **text_numbers(side)}
        if baseline is not None:
            pairs = annotate(_paired(baseline, side))
            numbers |= win_numbers(pairs, cfg.n, scale=cfg.scale)
            firsts = [(group.rewards or (None, None)) for group in pairs[:: cfg.n]]
            rewards[side.name] = [first[1] for first in firsts]
            if not cfg.pairwise or len(sides) == 1:
                rewards[baseline.name] = [first[0] for first in firsts]
            if not cfg.pairwise:
                numbers |= reward_numbers(pairs, 1)
                against = {"name": baseline.name, **text_numbers(baseline), **reward_numbers(pairs, 0)}
        if side.name in kls:
            numbers |= kl_numbers(side, kls[side.name])
        models.append(numbers)
    result: dict[str, Any] = {"models": models}
    if baseline is not None:
        result["baseline"] = against or {"name": baseline.name, **text_numbers(baseline)}
    if len(sides) > 1:
        every = [*sides, *([baseline] if baseline is not None else [])]
        groups = _shuffled_best(every, cfg, annotate)
        result["best_of"] = best_numbers(groups, [side.name for side in every])
        for place, side in enumerate(every):
            rewards.setdefault(side.name, [(group.rewards or ())[place] for group in groups])
    result["annotator"] = cfg.judge or " + ".join(map(str, cfg.reward))
    result["pairwise"] = cfg.pairwise
    return result | {"rewards": rewards}


def _paired(baseline: Side, side: Side) -> list[Group]:
    """Return a group of two for each pair: the baseline's i-th completion of a prompt, then the model's."""
    return [
        Group(old.prompt, (old.completions[i], new.completions[i]))
        for old, new in zip(baseline.groups, side.groups, strict=True)
        for i in range(len(new.completions))
    ]


def _shuffled_best(sides: Sequence[Side], cfg: EvaluateConfig, annotate: Annotator) -> list[Group]:
    """Annotate the first completions of all sides together, in an order drawn for each prompt."""
    orders: list[list[int]] = []
    groups = []
    for i, own in enumerate(zip(*(side.groups for side in sides), strict=True)):
        order = list(range(len(sides)))
        random.Random(seed_of(cfg.seed, "shuffle", i)).shuffle(order)
        orders.append(order)
        groups.append(Group(own[0].prompt, tuple(own[place].completions[0] for place in order)))
    results = []
    for group, order in zip(annotate(groups), orders, strict=True):
        back = [order.index(place) for place in range(len(order))]
        rewards = tuple((group.rewards or ())[j] for j in back)
        results.append(replace(group, completions=tuple(group.completions[j] for j in back), rewards=rewards))
    return results


def _rows(
    cfg: EvaluateConfig,
    sides: Sequence[Side],
    baseline: Side | None,
    rewards: Mapping[str, Sequence[float | None]],
) -> list[dict[str, Any]]:
    """Return a row for each prompt with the first completion of every side."""
    every = [*([baseline] if baseline is not None else []), *sides]
    rows = []
    for i, own in enumerate(zip(*(side.groups for side in every), strict=True)):
        prompt = own[0].prompt
        outputs = [
            {
                "name": side.name,
                "text": group.completions[0].text,
                "reward": rewards[side.name][i] if side.name in rewards else None,
                "tokens": len(group.completions[0].token_ids),
                "finish": group.completions[0].finish,
            }
            for side, group in zip(every, own, strict=True)
        ]
        rows.append({"prompt": prompt.text, "content": prompt.content, "outputs": outputs})
    return rows
