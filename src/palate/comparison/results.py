"""The numbers of a comparison: a row for each method, win rates between all, and clear differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from palate.comparison.arms import BASE, Arm, Budget
from palate.comparison.config import CompareConfig
from palate.comparison.measure import FRONTIER_PROMPTS, Measured, Meter, outcomes, spending
from palate.comparison.runs import usage
from palate.comparison.shared import Pool
from palate.effects import (
    Difference,
    Estimate,
    Part,
    contrast,
    differences,
    pooled_variance,
    rate_of,
)
from palate.evaluation.numbers import finite, text_numbers
from palate.winrates import Verdict, length_controlled

FEW = 6
"""Most clear differences that have a sentence each; more are grouped by the better method."""


def results(
    cfg: CompareConfig,
    arms: Sequence[Arm],
    budget: Budget,
    pooled: Mapping[str, Pool],
    reward_bill: Mapping[str, float],
    meter: Meter,
    measured: Sequence[Measured],
) -> dict[str, Any]:
    """Return the content of `summary.json`."""
    by_arm = {arm.name: [row for row in measured if row.job.arm == arm.name] for arm in arms}
    wins = {name: np.stack([_won(row) for row in rows]) for name, rows in by_arm.items()}
    rewards = {name: np.stack([row.rewards for row in rows]) for name, rows in by_arm.items()}
    judged = wins if meter.options.pairwise else rewards
    # The base has one set of completions, whatever the seed: its own row has no seeds.
    base = np.stack([measured[0].base])
    tables = judged if meter.options.pairwise else {BASE: base, **judged}
    quantity = "win rate over the base" if meter.options.pairwise else "mean reward"
    contrasts = _differences(tables)
    measures = {
        "win_rate": wins,
        "reward": rewards,
        "kl": {name: np.stack([row.log_ratios for row in rows]) for name, rows in by_arm.items()},
    }
    unit, amount = cfg.budget
    if cfg.gold:
        measures["gold"] = {
            name: np.stack([_present(row.gold) for row in rows]) for name, rows in by_arm.items()
        }
    result: dict[str, Any] = {
        "budget": {"unit": unit, "amount": amount, "steps": budget.steps},
        "annotator": cfg.passed.get("judge") or " + ".join(map(str, cfg.reward)),
        "gold": " + ".join(map(str, cfg.gold)),
        "model": cfg.model,
        "test_prompts": len(meter.prompts),
        "seeds": cfg.seeds,
        "base": {"name": BASE, "reward": float(np.nanmean(base)), **text_numbers(meter.base)},
        "methods": [
            _method_row(arm, by_arm[arm.name], pooled.get(arm.name), reward_bill, measures) for arm in arms
        ],
        "matrix": _matrix(meter, by_arm),
        "differences": [{**vars(d), "clear": d.clear} for d in contrasts],
        "sentences": sentences(contrasts, quantity),
        "frontier_prompts": min(FRONTIER_PROMPTS, len(meter.prompts)),
        "frontier": [vars(point) for row in measured for point in row.points],
        "tuned": cfg.tune is not None,
        "pairwise": meter.options.pairwise,
    }
    if cfg.gold:
        gold_base = np.stack([_present(measured[0].gold_base)])
        gold_differences = _differences({BASE: gold_base, **measures["gold"]})
        result["gold_differences"] = [{**vars(d), "clear": d.clear} for d in gold_differences]
        result["gold_sentences"] = sentences(gold_differences, "mean hidden reward")
        result["base"]["gold"] = float(np.nanmean(_present(measured[0].gold_base)))
    cleaned: dict[str, Any] = finite(result)
    return cleaned


def _present(values: np.ndarray | None) -> np.ndarray:
    assert values is not None, "a comparison with a hidden annotator asks it about every run"
    return values


def _won(row: Measured) -> np.ndarray:
    mine, theirs = row.rewards, row.base
    won = 0.5 * ((mine > theirs).astype(float) + (mine >= theirs))
    return np.where(np.isnan(mine) | np.isnan(theirs), np.nan, won)


def _differences(tables: Mapping[str, np.ndarray]) -> list[Difference]:
    return differences(tables, fixed={BASE}) if len(tables) > 1 else []


def _method_row(
    arm: Arm,
    rows: Sequence[Measured],
    pool: Pool | None,
    reward_bill: Mapping[str, float],
    measures: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    """Return the measured columns of a method: means with intervals over seeds and prompts."""
    others = {
        name: pooled_variance([table for other, table in tables.items() if other != arm.name])
        for name, tables in measures.items()
    }
    rate, low, high = rate_of(measures["win_rate"][arm.name], others["win_rate"])
    texts = [_texts(row) for row in rows]
    numbers: dict[str, Any] = {
        "name": arm.name,
        "method": arm.method.name,
        "seeds": [row.job.seed for row in rows],
        "lr": rows[0].job.values.get("lr"),
        "reward_by_seed": [float(np.nanmean(row.rewards)) for row in rows],
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "win_rate_by_seed": [float(np.nanmean(_won(row))) for row in rows],
        "length_controlled_win_rate": _controlled(rows),
        **{name: float(np.mean([text[name] for text in texts])) for name in texts[0]},
        **_bill(arm, rows, pool, reward_bill),
        "models": arm.method.recipe.cells.models,
    }
    for name in measures.keys() - {"win_rate"}:
        table = measures[name][arm.name]
        estimate = contrast(Part(1.0, table[:, ~np.isnan(table).any(0)]), pooled=others[name])
        numbers |= _around(name, estimate)
    return numbers


def _around(name: str, estimate: Estimate) -> dict[str, float]:
    """Return a mean with the ends of its interval."""
    low, high = estimate.mean - estimate.half, estimate.mean + estimate.half
    return {name: estimate.mean, f"{name}_low": low, f"{name}_high": high}


def _controlled(rows: Sequence[Measured]) -> float:
    verdicts = []
    for row in rows:
        for i, won in enumerate(_won(row)):
            if not math.isnan(won):
                mine = len(row.side.groups[i].completions[0].text)
                verdicts.append(Verdict(float(won), mine, row.base_lengths[i]))
    return length_controlled(verdicts).rate if verdicts else math.nan


def _texts(row: Measured) -> dict[str, float]:
    """Return the statistics of a run's texts; `tokens` is what the run sampled in all."""
    numbers = text_numbers(row.side)
    return {("tokens_each" if name == "tokens" else name): value for name, value in numbers.items()}


def _bill(
    arm: Arm, rows: Sequence[Measured], pool: Pool | None, reward_bill: Mapping[str, float]
) -> dict[str, float]:
    """Return what a run spent, as the mean over the seeds; the pool and a reward model are on the bill."""
    own = [spending(row.job) for row in rows]
    used = [usage(row.job) for row in rows]
    total = {name: float(np.mean([spent[name] for spent in own])) for name in own[0]}
    for name in ("completions", "tokens", "verdicts", "cost"):
        total[name] += float(getattr(pool, name, 0.0))
        if arm.asks_reward_model:
            # The verdicts of a reward model are free; the annotator labelled its pairs.
            if name == "verdicts" and reward_bill:
                total[name] = 0.0
            total[name] += reward_bill.get(name, 0.0)
    peaks = [use["peak_memory_gb"] for use in used]
    return total | {
        "cpu_seconds": float(np.mean([use["cpu_seconds"] for use in used])),
        "peak_memory_gb": max(peaks),
    }


def _matrix(meter: Meter, by_arm: Mapping[str, Sequence[Measured]]) -> dict[str, Any]:
    """Return the win rate of each method (row) against each other (column), over pairs of runs by seed."""
    names = list(by_arm)
    tables: dict[tuple[str, str], np.ndarray] = {}
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            pairs = zip(by_arm[one], by_arm[other], strict=False)
            tables[one, other] = np.stack([outcomes(meter, mine, theirs) for mine, theirs in pairs])
    cells = []
    for (one, other), table in tables.items():
        apart = [rest for pair, rest in tables.items() if not {one, other} & set(pair)]
        pooled = pooled_variance(apart)
        rate, low, high = rate_of(table, pooled)
        cells.append({"row": one, "column": other, "rate": rate, "low": low, "high": high})
        cells.append({"row": other, "column": one, "rate": 1 - rate, "low": 1 - high, "high": 1 - low})
    return {"names": names, "cells": cells}


def sentences(contrasts: Sequence[Difference], quantity: str) -> list[str]:
    """Return a plain summary: which differences exceed their uncertainty, and which do not."""
    if not contrasts:
        return []
    clear = [d for d in contrasts if d.clear]
    lines = _grouped(clear, quantity) if len(clear) > FEW else [_alone(d, quantity) for d in _surest(clear)]
    unclear = [
        f"{_spoken(d.one)} and {_spoken(d.other)}"
        for d in contrasts
        if not d.clear and not math.isnan(d.mean)
    ]
    if unclear:
        listed = "; ".join(unclear[:6]) + (f"; and {len(unclear) - 6} more pairs" if len(unclear) > 6 else "")
        lines.append(f"These data do not separate: {listed}.")
    unknown = [f"{_spoken(d.one)} and {_spoken(d.other)}" for d in contrasts if math.isnan(d.mean)]
    if unknown:
        lines.append(f"No prompt has a usable number of both {'; '.join(unknown)}.")
    covers = "other seeds and other prompts" if any(d.seeds for d in contrasts) else (
        "other prompts only: with one seed per method, a difference may be the seed's"
    )  # fmt: skip
    lines.append(
        f"The uncertainty covers {covers}."
        + (
            " Holm's correction keeps the chance of any false claim among the "
            f"{len(contrasts)} comparisons at 5 %."
            if len(contrasts) > 1
            else ""
        )
    )
    return lines


def _alone(d: Difference, quantity: str) -> str:
    """Return the sentence of one clear difference."""
    high, low, size = _sides(d)
    return (
        f"{_spoken(high)} has a higher {quantity} than {_spoken(low)}: the difference is {size} "
        f"(adjusted p {_p(d.adjusted)})."
    )


def _grouped(clear: Sequence[Difference], quantity: str) -> list[str]:
    """Return one sentence for each method that is clearly above others, the most of them first."""
    beaten: dict[str, list[str]] = {}
    for d in _surest(clear):
        high, low, size = _sides(d)
        beaten.setdefault(high, []).append(f"{_spoken(low)} by {size}")
    return [
        f"{_spoken(high)} has a clearly higher {quantity} than {', '.join(listed)}."
        for high, listed in sorted(beaten.items(), key=lambda pair: -len(pair[1]))
    ]


def _surest(differences: Sequence[Difference]) -> list[Difference]:
    return sorted(differences, key=lambda d: d.adjusted)


def _sides(d: Difference) -> tuple[str, str, str]:
    """Return the higher and the lower side of a difference, and its size with its interval."""
    high, low = (d.one, d.other) if d.mean > 0 else (d.other, d.one)
    ends = sorted((abs(d.low), abs(d.high)))
    return high, low, f"{abs(d.mean):.3g} [{ends[0]:.3g}, {ends[1]:.3g}]"


def _spoken(name: str) -> str:
    return "the model before training" if name == BASE else name


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else f"{value:.3f}"
