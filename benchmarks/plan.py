"""Compare plans with real runs: tokens, memory and time of several methods on the embedded model.

    python benchmarks/plan.py --output benchmarks/results/plan.json [--methods dpo,oaif]
    python benchmarks/plan.py --write   # the table into docs/choosing.md
    python benchmarks/plan.py --check

Each method is planned and run in processes of their own, one after the other; nothing else should run beside
them. Rows that the output file has are not made again.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from common import ROOT, commit

sys.path.insert(0, str(ROOT / "experiments"))
from machine import machine
from marks import missing, write

PAGE = ROOT / "docs" / "choosing.md"
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"

SAMPLED = ["--max-new-tokens", "24", "--batch-size", "4", "--seed", "1"]
PROMPTS = ["--data", "everyday", "--eval-data", "everyday", "--eval-limit", "8", "--reward", "length:20"]
ROUNDS = ["--limit", "12", "--n", "4", "--steps", "2"]
PAIRS = ["--data", "PAIRS", "--limit", "24", "--steps", "3", "--batch-size", "4", "--seed", "1"]
DEMONSTRATIONS = ["--data", "PAIRS", "--map", "completion=chosen", "--limit", "24"]
CASES: dict[str, list[str]] = {
    "oaif": [*PROMPTS, *SAMPLED, "--steps", "4"],
    "rlhf": [*PROMPTS, *SAMPLED, "--steps", "2"],
    "rft": [*PROMPTS, *SAMPLED, *ROUNDS, "--rounds", "2"],
    "iterative-dpo": [*PROMPTS, *SAMPLED, *ROUNDS, "--rounds", "2"],
    "pairwise-cringe": [*PROMPTS, *SAMPLED, *ROUNDS, "--rounds", "2"],
    "rest": [
        *PROMPTS, *SAMPLED, *ROUNDS, "--rounds", "1", "--threshold-by", "quantile", "--thresholds", "0.5",
    ],
    "rso": [*PROMPTS, *SAMPLED, *ROUNDS, "--accept", "4"],
    "rrhf": [*PROMPTS, *SAMPLED, *ROUNDS],
    "slic-hf": [*PROMPTS, *SAMPLED, *ROUNDS],
    "dpo": [*PAIRS, "--max-new-tokens", "24"],
    "ipo": [*PAIRS, "--max-new-tokens", "24"],
    "sft": [*DEMONSTRATIONS, *SAMPLED, "--steps", "3"],
    "spin": [*DEMONSTRATIONS, *SAMPLED, "--steps", "2", "--rounds", "2"],
}  # fmt: skip
WITHIN = {"tokens": 0.20, "memory": 0.25, "seconds": 0.40}
"""Largest relative difference of an expectation from the run."""

IDLE = (
    "import resource, palate.launch, palate.cli.commands.run, torch\n"
    "torch.zeros(8) @ torch.zeros(8)\n"
    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)\n"
)
"""The peak memory of a process that has loaded what a run loads, and does nothing."""


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--methods", default=",".join(CASES))
    parser.add_argument("--write", action="store_true", help="write the table into docs/choosing.md, and end")
    parser.add_argument("--check", action="store_true", help="say whether docs/choosing.md has the table")
    given = parser.parse_args()
    if given.write or given.check:
        parts = {"plans": table(json.loads(given.output.read_text()))}
        if given.write:
            write(PAGE, parts)
        else:
            sys.exit(f"not what benchmarks/plan.py writes: {PAGE}" if missing(PAGE, parts) else 0)
        return
    rows: dict[str, Any] = {}
    if given.output.exists():
        rows = json.loads(given.output.read_text())["methods"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        idle = int(started(["-c", IDLE], work)[0].splitlines()[-1])
        write_pairs(work / "pairs.jsonl")
        for method in given.methods.split(","):
            if method in rows:
                continue
            rows[method] = row(method, work, idle)
            print(method, json.dumps(rows[method]), flush=True)
            result = {"machine": machine(), "commit": commit(), "within": WITHIN, "methods": rows}
            given.output.write_text(json.dumps(result, indent=1) + "\n")


def write_pairs(file: Path) -> None:
    """Write pairs of built-in prompts with texts of several lengths."""
    import palate

    texts = [prompt.text for prompt in palate.read_prompts("everyday")][:48]
    rows = (
        {"prompt": texts[i], "chosen": " ".join(texts[i + 1 : i + 3]), "rejected": texts[i + 3]}
        for i in range(len(texts) - 4)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(result: dict[str, Any]) -> list[str]:
    """Return the results in Markdown."""
    heads = ("method", "tokens", "at most", "expected", "memory (MB)", "planned", "seconds", "planned")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    outside = []
    for method, one in result["methods"].items():
        cells = (
            f"`{method}`", f"{one['tokens']:,}", f"{one['most_tokens']:,}", f"{one['expected_tokens']:,.0f}",
            f"{one['memory_mb']:,}", difference(one["planned_memory_mb"], one["memory_mb"]),
            f"{one['seconds']:.0f}", difference(one["planned_seconds"], one["seconds"]),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        pairs = {
            "tokens": (one["expected_tokens"], one["tokens"]),
            "memory": (one["planned_memory_mb"], one["memory_mb"]),
            "seconds": (one["planned_seconds"], one["seconds"]),
        }
        outside += [
            f"the {name} of `{method}`"
            for name, (planned, measured) in pairs.items()
            if abs(planned - measured) > WITHIN[name] * measured
        ]
        if one["tokens"] > one["most_tokens"]:
            outside.append(f"the bound on the tokens of `{method}`")
    limits = ", ".join(f"{name} within {share:.0%}" for name, share in WITHIN.items())
    known = result["machine"]
    told = f"Outside these limits: {', '.join(outside)}." if outside else "All rows are within these limits."
    return [
        *lines, "", f"Limits: {limits}. {told}", "",
        f"{known['processor']}, {known['cores']} cores ({known['units']}), torch {known['torch']}, "
        f"{known['date']} ([rows](../benchmarks/results/plan.json)).",
    ]  # fmt: skip


def difference(planned: float, measured: float) -> str:
    """Return a planned number and its relative difference from the measured one."""
    return f"{planned:,.0f} ({planned / measured - 1:+.0%})"


def row(method: str, work: Path, idle: int) -> dict[str, Any]:
    """Plan and run a method, and return both sides."""
    words = [method, *(str(work / "pairs.jsonl") if word == "PAIRS" else word for word in CASES[method])]
    plan = json.loads(started(["-m", "palate", "plan", *words, "--json"], work)[0])
    bound = json.loads(started(["-m", "palate", "plan", *words, "--json", "--pilot", "0"], work)[0])
    place = work / method
    _, peak, seconds = started(["-m", "palate", "run", *words, "--output", str(place)], work)
    completions, tokens = sampled(place / "journal.db")
    measured = json.loads((place / "summary.json").read_text())["seconds"]
    return {
        "completions": completions,
        "most_completions": sum(bound["completions"].values()),
        "tokens": tokens,
        "most_tokens": bound["sampled"]["most"],
        "expected_tokens": plan["sampled"]["expected"],
        "memory_mb": round((peak - idle) / 1e6),
        "planned_memory_mb": round(plan["memory"]["peak"] / 1e6),
        "planned_without_pilot_mb": round(bound["memory"]["peak"] / 1e6),
        "seconds": measured,
        "process_seconds": round(seconds, 1),
        "planned_seconds": round(plan["seconds"]["total"], 1),
        "planned_parts": plan["seconds"],
    }


def started(arguments: list[str], work: Path) -> tuple[str, int, float]:
    """Run Python and return its output, its peak memory in bytes and its seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    began = time.perf_counter()
    with open(work / "stdout", "w+") as out, open(work / "stderr", "w+") as err:
        process = subprocess.Popen(
            [sys.executable, *arguments], stdout=out, stderr=err, cwd=work, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        if os.waitstatus_to_exitcode(status) != 0:
            raise SystemExit(f"{' '.join(arguments)} failed:\n{err.read()[-2000:]}")
        return out.read(), usage.ru_maxrss * 1024, seconds


def sampled(journal: Path) -> tuple[int, int]:
    """Return the number of completions in a run's journal, and of their tokens."""
    with sqlite3.connect(journal) as db:
        count, size = db.execute(
            "SELECT count(*), coalesce(sum(length(token_ids)), 0) FROM completions"
        ).fetchone()
    return count, size // 4


if __name__ == "__main__":
    main()
