"""Annotator strength: oaif with gold, with noisy gold and with a weak model as judge.

SmolLM2-135M-Instruct, LoRA, everyday prompts, two completions each. Gold is VADER's sentiment. The noisy
annotators swap the winner of 20 or 40 % of the comparisons; the weak judge is the untrained model itself,
which compares with the criteria "Prefer the more cheerful answer". Every annotator sees the same prompts.
A row has the mean gold reward of the fresh samples of each step, and the comparison with the base on held-out
prompts, by gold. Rows that exist are not made again; an interrupted run resumes.

    python experiments/annotator_strength.py --work runs/strength
    python experiments/annotator_strength.py --write      # into docs/methods/oaif.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import palate
from machine import machine
from marks import missing, write
from palate.annotate import sentiment
from palate.quiet import quiet_libraries
from palate.types import Completion, Prompt

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods" / "oaif.md"
RESULTS = Path(__file__).parent / "results" / "annotator_strength.jsonl"
STEPS, BATCH = 20, 16
COMMON = {
    "model": "smollm2", "dtype": "bfloat16", "lora_rank": 16, "lr": 6e-4, "schedule": "linear",
    "data": "everyday", "batch_size": BATCH, "steps": STEPS, "n": 2, "temperature": 1.0, "max_new_tokens": 32,
    "eval_data": "everyday", "eval_limit": 60, "eval_reward": "sentiment", "fresh_prompts": 0,
}  # fmt: skip
ARMS: Mapping[str, Mapping[str, Any]] = {
    "gold": {"reward": "sentiment"},
    "noise 0.2": {"reward": "sentiment", "label_noise": 0.2},
    "noise 0.4": {"reward": "sentiment", "label_noise": 0.4},
    "weak judge": {
        "judge": "local:smollm2", "judge_label_mass": 0.0, "criteria": "Prefer the more cheerful answer.",
    },
}  # fmt: skip
WINDOW = 4
"""Steps in a mean of the table."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/annotator-strength"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--write", action="store_true", help="put the results into docs/methods/oaif.md")
    parser.add_argument("--check", action="store_true", help="say whether the document is as the rows say")
    args = parser.parse_args()
    parts = {"annotator strength": paragraph(rows())}
    if args.check:
        sys.exit(f"not what experiments/annotator_strength.py writes: {PAGE}" if missing(PAGE, parts) else 0)
    if args.write:
        write(PAGE, parts)
        return
    quiet_libraries()
    for seed in args.seeds:
        for arm in args.arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in rows()):
                made = run(arm, seed, args.work)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(made) + "\n")


def rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """One run and its row."""
    output = work / f"{arm.replace(' ', '-')}-{seed}"
    outcome = palate.train("oaif", output=output, seed=seed, **COMMON, **ARMS[arm])
    kept = ("reward_before", "reward_after", "win_rate", "win_rate_low", "win_rate_high", "kl", "compared",
            "length_before", "length_after", "seconds")  # fmt: skip
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    disagree = [row["judge/orders_disagree"] for row in metrics if "judge/orders_disagree" in row]
    return {
        "arm": arm,
        "seed": seed,
        "gold_by_step": gold_by_step(output / "completions.parquet"),
        "right": agreement(output / "completions.parquet"),
        "orders_disagree": statistics.mean(disagree) if disagree else None,
        **{name: outcome.summary[name] for name in kept},
        "steps": STEPS,
        "batch_size": BATCH,
        "machine": machine(),
    }


def gold_by_step(file: Path) -> list[float]:
    """The mean gold reward of the samples of each step."""
    by_step: dict[int, list[float]] = defaultdict(list)
    for row, gold in scored(file):
        by_step[int(row["place"].split()[1])].append(gold)
    return [round(statistics.mean(by_step[step]), 4) for step in sorted(by_step)]


def agreement(file: Path) -> dict[str, int]:
    """How many of the annotator's pairs have the same winner by gold."""
    pairs: dict[tuple[str, str], list[tuple[float | None, float]]] = defaultdict(list)
    for row, gold in scored(file):
        pairs[row["place"], json.dumps(row["prompt"])].append((row["reward"], gold))
    labelled = [
        (one[0] - other[0]) * (one[1] - other[1])
        for one, other in (pair for pair in pairs.values() if len(pair) == 2)
        if one[0] is not None and other[0] is not None and one[0] != other[0] and one[1] != other[1]
    ]
    return {"right": sum(product > 0 for product in labelled), "of": len(labelled)}


def scored(file: Path) -> list[tuple[dict[str, Any], float]]:
    """The samples of the steps with their gold rewards."""
    samples = [row for row in pq.read_table(file).to_pylist() if row["place"].startswith("step ")]
    scorer = sentiment()
    texts = [Completion(row["completion"], (0,)) for row in samples]
    golds = scorer([Prompt("")] * len(texts), texts)
    return [(row, gold) for row, gold in zip(samples, golds, strict=True) if gold is not None]


def paragraph(made: Sequence[dict[str, Any]]) -> list[str]:
    """The results in Markdown."""
    spans = [(start, start + WINDOW) for start in range(0, STEPS, WINDOW)]
    heads = ["annotator", "seeds", "labels as gold",
             *(f"gold reward, steps {a + 1}–{b}" for a, b in spans),
             "held out: before → after", "win rate over the base, by seed", "KL (nats)"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm in ARMS:
        own = [row for row in made if row["arm"] == arm]
        if not own:
            continue

        def mean(name: str, own: Sequence[dict[str, Any]] = own) -> float:
            return statistics.mean(row[name] for row in own)

        right, of = (sum(row["right"][part] for row in own) for part in ("right", "of"))
        cells = [
            arm, str(len(own)), f"{right / of:.0%} of {of}",
            *(f"{statistics.mean(statistics.mean(row['gold_by_step'][a:b]) for row in own):.2f}"
              for a, b in spans),
            f"{mean('reward_before'):.2f} → {mean('reward_after'):.2f}",
            " ".join(f"{row['win_rate']:.2f}" for row in own), f"{mean('kl'):.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
