"""RLHF beside online DPO on the task of the demo: cheerful answers that keep to the question.

SmolLM2-135M-Instruct, gold is `sentiment + 0.4 * on-topic`. Every arm samples the same number of completions
of the same length. Arms with `gold` ask gold itself; arms with `model` ask a reward model that learnt from
pairs labelled by gold; `rlaif` trains a reward model of its own in the same run, from the soft verdicts of a
scripted judge: P(first preferred) is the logistic function of 3 times gold's difference; for it, `rlaif`
samples 720 more completions. All are measured by gold on the same held-out prompts. Each run is a process of
its own, and its row is appended to the results as soon as it is there; rows that are there are not made
again; a run that was interrupted resumes.

    python experiments/rl.py --seeds 0 1 2
    python experiments/rl.py --write    # the tables into docs/methods/rlhf.md and rlaif.md
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import palate
from machine import machine
from marks import missing, write
from palate.config import MethodConfig, Sampling
from palate.quiet import quiet_libraries
from palate.types import Completion, Group, Prompt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "rl.jsonl"
PAGES = {name: ROOT / "docs" / "methods" / f"{name}.md" for name in ("rlhf", "rlaif")}
GOLD = ["sentiment", "0.4*on-topic"]
STEPS, COMPLETIONS, NEW_TOKENS = 16, 48, 40
"""Steps (rollout phases) of every arm, completions of a step, and tokens of a completion at most."""
POLICY = {"model": "smollm2", "data": "everyday", "dtype": "bfloat16", "lora_rank": 16}
COMMON = {
    **POLICY, "eval_data": "everyday", "eval_limit": 60, "eval_reward": GOLD, "steps": STEPS,
    "max_new_tokens": NEW_TOKENS, "temperature": 1.0, "missing_eos_penalty": 0, "schedule": "linear",
}  # fmt: skip
OAIF = {"batch_size": 6, "n": 8, "lr": 6e-4}
GAE = {"estimator": "gae", "batch_size": 6, "n": 8, "ppo_epochs": 1, "mini_batches": 3, "lr": 3e-4}
RLOO = {"estimator": "rloo", "batch_size": 6, "n": 8, "mini_batches": 1, "lr": 6e-4}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "oaif, gold": ("oaif", {"reward": GOLD, **OAIF}),
    "rlhf gae, gold": ("rlhf", {"reward": GOLD, **GAE}),
    "rlhf rloo, gold": ("rlhf", {"reward": GOLD, **RLOO}),
    "oaif, model": ("oaif", {"reward": "MODEL", **OAIF}),
    "rlhf gae, model": ("rlhf", {"reward": "MODEL", **GAE}),
    "rlaif gae, judge": (
        "rlaif",
        {"candidates": 3, "preference_prompts": 240, "reward_lr": 1.2e-3, "reward_epochs": 2, **GAE},
    ),
}
"""The method of each arm, and its own settings."""
LABELLED, EACH = 240, 8
"""Prompts whose samples gold labels for the reward model of `model`, and completions of each."""
KEPT = (
    "reward_before", "reward_after", "win_rate", "win_rate_low", "win_rate_high", "kl", "length_before",
    "length_after", "eos_after", "compared",
)  # fmt: skip
"""Numbers of `summary.json` in a row."""


class GoldJudge:
    """A judge whose verdicts follow gold: log-odds of 3 times the difference of the two rewards."""

    name = "gold"

    def __init__(self) -> None:
        self._gold = palate.annotator(GOLD)

    def __call__(
        self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
    ) -> list[float | None]:
        """Return P(first preferred) for each pair."""
        groups = self._gold([Group(p, pair) for p, pair in zip(prompts, pairs, strict=True)])
        differences = [(a or 0.0) - (b or 0.0) for a, b in (group.rewards or () for group in groups)]
        return [float(torch.tensor(3.0 * d, dtype=torch.float64).sigmoid()) for d in differences]


def reward_model(work: Path) -> Path:
    """Return the directory of a reward model that learnt from gold's labels; train it once."""
    data, output = work / "pairs.jsonl", work / "reward-model"
    if not data.exists():
        base = palate.Policy.load(MethodConfig(**POLICY, lr=1e-4), total_steps=1).snapshot()
        train = palate.read_prompts("everyday")[:LABELLED]
        groups = palate.annotator(GOLD)(base.sample(train, EACH, Sampling(max_new_tokens=NEW_TOKENS), seed=4))
        halves = [pair for group in groups for pair in _outside_in(group)]
        palate.write_rows(
            data,
            [
                {"prompt": p.prompt.content, "chosen": p.chosen.text, "rejected": p.rejected.text}
                for p in halves
            ],
        )
    if not (output / "summary.json").exists():
        cfg = palate.METHODS["reward-model"].configure(
            {
                **POLICY,
                "data": str(data),
                "lr": 1.2e-3,
                "warmup_steps": 5,
                "schedule": "linear",
                "batch_size": 16,
                "output": output,
            }
        )
        palate.train("reward-model", cfg, display=palate.Display())
    return output


def lines_of(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics."""
    text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def pairs_right(work: Path) -> float:
    """Return the share of pairs that the reward model ranked as gold does before it learnt from them.

    It is the mean over the second half of its only pass.
    """
    shares = [line["accuracy"] for line in lines_of(work / "reward-model") if "accuracy" in line]
    return round(statistics.fmean(shares[len(shares) // 2 :]), 3)


def _outside_in(group: Group) -> list[palate.Pair]:
    """Pair best with worst, second best with second worst, and so on, without ties."""
    rewards = [reward or 0.0 for reward in group.rewards or ()]
    ranked = sorted(zip(rewards, group.completions, strict=True), key=lambda pair: -pair[0])
    halves = zip(ranked[: len(ranked) // 2], ranked[::-1], strict=False)
    return [palate.Pair(group.prompt, best, worst) for (high, best), (low, worst) in halves if high > low]


def run(arm: str, seed: int, work: Path) -> dict[str, Any]:
    """Train and measure one arm in this process; return its row."""
    method, own = ARMS[arm]
    own = dict(own)
    if own.get("reward") == "MODEL":
        own["reward"] = f"model:{reward_model(work)}"
    output = work / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    resumed = output.exists()
    cfg = palate.METHODS[method].configure({**COMMON, **own, "seed": seed, "output": output})
    began = time.process_time()
    judge = GoldJudge() if method == "rlaif" else None
    outcome = palate.train(method, cfg, judge=judge, display=palate.Display())
    cpu_seconds = None if resumed else round(time.process_time() - began, 1)
    peak = None if resumed else round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    lines = [line for line in lines_of(output) if "objective/scores" in line]
    scores = [line["objective/scores"] for line in lines]
    spread = [line["objective/scores_std"] for line in lines if "objective/scores_std" in line]
    return {
        "arm": arm,
        "seed": seed,
        **{name: round(outcome.summary[name], 4) for name in KEPT},
        "updates": outcome.learner.version,
        "first_score": round(scores[0], 4),
        "last_score": round(scores[-1], 4),
        "scores_std": round(spread[0], 3) if spread else None,
        "pairs_right": pairs_right(work) if ARMS[arm][1].get("reward") == "MODEL" else None,
        "cpu_seconds": cpu_seconds,
        "peak_memory_gb": peak,
        "threads": torch.get_num_threads(),
        "settings": {**COMMON, **ARMS[arm][1]},
        "machine": machine(),
    }


def table(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> list[str]:
    """Return a table of the arms of some methods: means over the seeds."""
    heads = (
        "arm", "seeds", "gold reward before → after", "by seed", "win rate over the start", "KL (nats)",
        "tokens each", "optimizer steps", "deviation of the first rewards", "processor seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for arm, (method, _) in ARMS.items():
        own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["seed"])
        if method not in methods or not own:
            continue

        def mean(name: str, own: Sequence[dict[str, Any]] = own) -> float:
            known = [row[name] for row in own if row[name] is not None]
            return statistics.fmean(known) if known else float("nan")

        cells = (
            arm, str(len(own)), f"{mean('reward_before'):.2f} → {mean('reward_after'):.2f}",
            " ".join(f"{row['reward_after']:.2f}" for row in own), f"{mean('win_rate'):.2f}",
            f"{mean('kl'):.1f}", f"{mean('length_after'):.0f}", f"{mean('updates'):.0f}",
            f"{mean('scores_std'):.2f}", f"{mean('cpu_seconds'):.0f}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def documents(rows: Sequence[dict[str, Any]]) -> dict[Path, dict[str, list[str]]]:
    """Return the parts of the method pages."""
    parts: dict[Path, dict[str, list[str]]] = {}
    for name, methods in (("rlhf", ("rlhf", "oaif")), ("rlaif", ("rlaif", "rlhf", "oaif"))):
        if not any(ARMS[row["arm"]][0] == name for row in rows):
            parts[PAGES[name]] = {"measured": ["This task has not been measured yet."]}
            continue
        known = rows[-1]["machine"]
        text = (
            f"{STEPS} steps of {COMPLETIONS} completions of at most {NEW_TOKENS} tokens, LoRA of rank 16, "
            f"bfloat16, {rows[0]['compared']} held-out prompts; {known['processor']}, one core, "
            f"torch {known['torch']}, {known['date']}."
        )
        learnt = [row["pairs_right"] for row in rows if row.get("pairs_right")]
        if learnt:
            text += (
                f" The reward model of `model` ranked {learnt[0]:.2f} of the pairs as gold does, before it "
                "learnt from them, in the second half of its training."
            )
        parts[PAGES[name]] = {"measured": [*table(rows, methods), "", *textwrap.wrap(text, 120)]}
    return parts


def rows_of() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Run what is not there yet, or write the pages, or check them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "rl")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--one", action="store_true", help="one run in this process; used by the others")
    parser.add_argument("--write", action="store_true", help="write the pages from the rows, and end")
    parser.add_argument("--check", action="store_true", help="fail unless the pages are as the rows say")
    given = parser.parse_args()
    if given.write:
        for page, parts in documents(rows_of()).items():
            write(page, parts)
    elif given.check:
        old = [str(page) for page, parts in documents(rows_of()).items() if missing(page, parts)]
        sys.exit(f"not what experiments/rl.py writes: {', '.join(old)}" if old else 0)
    elif given.one:
        quiet_libraries()
        row = run(given.arms[0], given.seeds[0], given.work)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    else:
        given.work.mkdir(parents=True, exist_ok=True)
        there = {(row["arm"], row["seed"]) for row in rows_of()}
        for seed in given.seeds:
            for arm in given.arms:
                if (arm, seed) not in there:
                    one = ["--one", "--seeds", str(seed), "--arms", arm, "--work", str(given.work)]
                    subprocess.run([sys.executable, __file__, *one], check=True)


if __name__ == "__main__":
    main()
