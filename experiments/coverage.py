"""Simulate how often the 95 % interval of `palate.statistics.rate_interval` holds the true rate.

In every simulation each prompt has a win probability of its own, drawn from a beta distribution around the
true rate, and outcomes drawn by it. `correlation` is that of two outcomes of one prompt: 0 for prompts that
are all alike, 1 for prompts whose outcomes are all the same. Beside the interval stands Wilson's with prompts
as trials, and with pairs as trials.

python experiments/coverage.py                # print the table
python experiments/coverage.py --simulate     # simulate again: a few minutes
python experiments/coverage.py --write        # put the table into docs/statistics.md; --check compares
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from machine import machine
from marks import missing, write
from palate.statistics import rate_interval, wilson

RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "statistics.md"
PROMPTS = (5, 10, 20, 50, 100, 200)
RATES = (0.5, 0.6, 0.7, 0.8, 0.9)
SIMULATIONS = 2000
"""Of each rate."""

Sizes = Callable[[Generator, int], np.ndarray]


@dataclass(frozen=True)
class Design:
    """How outcomes come about.

    Attributes:
        name: in the table.
        sizes: pairs of each of so many prompts. int (K,)
        correlation: of the outcomes of one prompt.
        ties: share of outcomes that are ties at a rate of one half; at others fewer, so that they fit in.
    """

    name: str
    sizes: Sizes
    correlation: float
    ties: float = 0.0

    def draw(self, rng: Generator, prompts: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
        """Outcomes and the number of the prompt of each. (N,)"""
        of = np.repeat(np.arange(prompts), self.sizes(rng, prompts))
        if self.correlation == 0:
            chance = np.full(prompts, rate)
        elif self.correlation == 1:
            chance = (rng.random(prompts) < rate).astype(float)
        else:
            weight = 1 / self.correlation - 1
            chance = rng.beta(rate * weight, (1 - rate) * weight, prompts)
        won = (rng.random(len(of)) < chance[of]).astype(float)
        # A tie takes as much from the wins as from the losses, so the rate stays what it is.
        other = rng.random(len(of)) < chance[of]
        tie = (won != other) & (rng.random(len(of)) < self.ties * 2)
        return np.where(tie, 0.5, won), of


def each(count: int) -> Sizes:
    return lambda rng, prompts: np.full(prompts, count)


def geometric(rng: Generator, prompts: int) -> np.ndarray:
    return np.minimum(rng.geometric(0.25, prompts), 50)


def lognormal(rng: Generator, prompts: int) -> np.ndarray:
    return np.minimum(np.ceil(rng.lognormal(1.0, 1.2, prompts)), 200).astype(int)


DESIGNS = (
    Design("1 pair each", each(1), 0.3),
    Design("1 pair each, up to half of them ties", each(1), 0.3, ties=0.5),
    Design("4 pairs each, independent", each(4), 0.0),
    Design("4 pairs each", each(4), 0.3),
    Design("4 pairs each, up to half of them ties", each(4), 0.3, ties=0.5),
    Design("4 pairs each, always the same outcome", each(4), 1.0),
    Design("1 to 8 pairs, up to half of them ties", lambda rng, k: rng.integers(1, 9, k), 0.3, ties=0.5),
    Design("1 to 50 pairs (mean 4), independent", geometric, 0.0),
    Design("1 to 50 pairs (mean 4)", geometric, 0.3),
    Design("1 to 50 pairs (mean 4), always the same outcome", geometric, 1.0),
    Design("1 to 200 pairs (mean 6)", lognormal, 0.3),
    Design("1 to 200 pairs (mean 6), always the same outcome", lognormal, 1.0),
)
SIDES = ("interval", "prompts", "pairs")


def coverage(design: Design, prompts: int, *, simulations: int, seed: int) -> dict[str, float]:
    """Share of simulations in which an interval holds the rate: ours, Wilson's of prompts and of pairs."""
    rng = np.random.default_rng([seed, prompts])
    held = dict.fromkeys(SIDES, 0)
    for rate in RATES:
        for _ in range(simulations):
            outcomes, of = design.draw(rng, prompts, rate)
            ours = rate_interval(outcomes.tolist(), of.tolist())
            others = (wilson(ours.rate, trials) for trials in (prompts, len(outcomes)))
            for side, (low, high) in zip(SIDES, ((ours.low, ours.high), *others), strict=True):
                held[side] += low <= rate <= high
    return {side: count / (simulations * len(RATES)) for side, count in held.items()}


def simulate() -> dict[str, Any]:
    """All designs at all numbers of prompts."""
    rows = []
    for number, design in enumerate(DESIGNS):
        for prompts in PROMPTS:
            found = coverage(design, prompts, simulations=SIMULATIONS, seed=number)
            rows.append({"design": design.name, "prompts": prompts, **found})
            print(rows[-1], file=sys.stderr, flush=True)
    return {"simulations": SIMULATIONS, "rates": RATES, "rows": rows, "machine": machine()}


def table(result: dict[str, Any]) -> list[str]:
    """The coverage as Markdown, one row per design."""
    heads = [
        "pairs of a prompt", "correlation", *(f"{k} prompts" for k in PROMPTS),
        "prompts as trials", "pairs as trials",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for design in DESIGNS:
        own = [row for row in result["rows"] if row["design"] == design.name]
        spans = (
            f"{min(row[side] for row in own):.3f} to {max(row[side] for row in own):.3f}"
            for side in SIDES[1:]
        )
        cells = [design.name, f"{design.correlation:g}", *(f"{row['interval']:.3f}" for row in own), *spans]
        lines.append(f"| {' | '.join(cells)} |")
    total = result["simulations"] * len(result["rates"])
    return [*lines, "", f"{total:,} simulations a cell, {result['machine']['date']}."]


def main() -> None:
    """Print the table, simulate, write the page, or check it."""
    if sys.argv[1:] == ["--simulate"]:
        RESULTS.write_text(json.dumps(simulate(), indent=1) + "\n", encoding="utf-8")
    parts = {"coverage": table(json.loads(RESULTS.read_text(encoding="utf-8")))}
    if sys.argv[1:] == ["--write"]:
        write(PAGE, parts)
    elif sys.argv[1:] == ["--check"]:
        sys.exit(
            "docs/statistics.md is not as experiments/coverage.py writes it" if missing(PAGE, parts) else 0
        )
    else:
        print("\n".join(parts["coverage"]))


if __name__ == "__main__":
    main()
