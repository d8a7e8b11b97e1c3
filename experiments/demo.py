"""Measure the demo: `configs/demo.yaml` on several seeds and in several number formats.

Each run is a process of its own, as `make demo` is one, and its row is appended to the results with the
processor and the date. Rows that are there are not made again; a run that was interrupted resumes. A row has
the first ten held-out prompts with the answers before and after, to be read: `on_topic` is what
`annotate/topic.py` says of the ten answers after (a content word of the prompt is in them), and not the
judgement of a reader. With OMP_NUM_THREADS=1, several runs can go on side by side; the seconds of such runs
say nothing and are left out of the table.

    python experiments/demo.py --seeds 0 1 2 --dtypes bfloat16 float32
    python experiments/demo.py --write    # the table and the answers into docs/demo.md
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import palate
from machine import machine
from marks import missing, write
from palate.annotate.topic import score
from palate.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "demo.yaml"
RESULTS = Path(__file__).parent / "results" / "demo.jsonl"
READINGS = RESULTS.with_name("demo_readings.json")
"""The answers after training that are off topic as read, from 0, by number format, seed and threads."""
PAGE = ROOT / "docs" / "demo.md"
READ = 10
"""Held-out prompts whose answers are shown."""
KEPT = (
    "steps", "win_rate", "win_rate_low", "win_rate_high", "kl", "reward_before", "reward_after",
    "length_before", "length_after", "compared",
)  # fmt: skip
"""Numbers of `summary.json` in a row."""


def run(seed: int, dtype: str, work: Path) -> dict[str, Any]:
    """One run of the demo, in this process."""
    numbers = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    output = work / f"{dtype}-{seed}"
    resumed = output.exists()
    cfg = palate.METHODS["oaif"].configure({**numbers, "seed": seed, "dtype": dtype, "output": output})
    began = time.process_time()
    outcome = palate.train("oaif", cfg, display=palate.Display())
    lines = (output / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:READ]
    answers = [json.loads(line) for line in lines]
    metrics = (output / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    measured = [row for row in (json.loads(line) for line in metrics if line) if "kl/fresh" in row]
    return {
        "seed": seed,
        "dtype": dtype,
        **{name: round(outcome.summary[name], 4) for name in KEPT},
        "kl_by_step": {row["step"]: round(row["kl/fresh"], 2) for row in measured},
        "seconds": outcome.summary["seconds"],
        "cpu_seconds": None if resumed else round(time.process_time() - began, 1),
        "threads": torch.get_num_threads(),
        "on_topic": sum(score(row["prompt"], row["after"]) > 0 for row in answers),
        "answers": [{name: row[name] for name in ("prompt", "before", "after")} for row in answers],
        "config": numbers,
        "machine": machine(),
    }


def documents(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The parts of the page: a table of all rows, and the answers of each."""
    if not rows:
        return {"demo": ["This configuration has not been measured yet."], "answers": []}
    heads = (
        "number format", "seed", "steps", "win rate by VADER", "KL (nats)", "VADER before → after",
        "of ten, on topic by the rule", "as read", "threads", "seconds", "processor seconds",
    )  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    told: list[str] = []
    readings = json.loads(READINGS.read_text(encoding="utf-8")) if READINGS.exists() else {}
    for row in sorted(rows, key=lambda row: (row["dtype"], row["seed"], row["threads"])):
        off = readings.get(f"{row['dtype']} {row['seed']} {row['threads']}")
        cpu = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"
        cells = (
            row["dtype"], str(row["seed"]), f"{row['steps']:.0f}",
            f"{row['win_rate']:.3f} [{row['win_rate_low']:.3f}, {row['win_rate_high']:.3f}]",
            f"{row['kl']:.1f}", f"{row['reward_before']:.2f} → {row['reward_after']:.2f}",
            str(row["on_topic"]), "" if off is None else str(len(row["answers"]) - len(off)),
            str(row["threads"]), f"{row['seconds']:.0f}" if row["threads"] > 1 else "", cpu,
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
        name = f"{row['dtype']}, seed {row['seed']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        told += ["", f"### {name}", ""]
        for i, answer in enumerate(row["answers"]):
            mark = " (off topic as read)" if i in (off or ()) else ""
            told.append(f"- **{_flat(answer['prompt'])}**{mark}")
            told += [f"  - {when}: {_flat(answer[when])}" for when in ("before", "after")]
    kinds = sorted({_machine(row) for row in rows})
    return {"demo": [*lines, "", *kinds], "answers": told[1:]}


def _machine(row: dict[str, Any]) -> str:
    known = row["machine"]
    units = "AMX" if known["amx"] else known["instruction_set"]
    return f"{known['processor']}, {known['cores']} cores ({units}), torch {known['torch']}, {known['date']}."


def _flat(text: str) -> str:
    """A text on one line of Markdown, with nothing in it that Markdown reads."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in " ".join(text.split()))


def rows_of() -> list[dict[str, Any]]:
    """The rows that are there."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").split("\n") if line]


def main() -> None:
    """Run what is not there yet, or write the page, or check it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "demo-seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--one", action="store_true", help="one run in this process; used by the others")
    parser.add_argument("--write", action="store_true", help="write docs/demo.md from the rows, and end")
    parser.add_argument("--check", action="store_true", help="say whether docs/demo.md is as the rows say")
    given = parser.parse_args()
    if given.write:
        write(PAGE, documents(rows_of()))
    elif given.check:
        sys.exit(f"not what experiments/demo.py writes: {PAGE}" if missing(PAGE, documents(rows_of())) else 0)
    elif given.one:
        quiet_libraries()
        row = run(given.seeds[0], given.dtypes[0], given.work)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    else:
        threads = torch.get_num_threads()
        there = {(row["dtype"], row["seed"]) for row in rows_of() if row["threads"] == threads}
        for dtype in given.dtypes:
            for seed in given.seeds:
                if (dtype, seed) not in there:
                    one = ["--one", "--seeds", str(seed), "--dtypes", dtype, "--work", str(given.work)]
                    subprocess.run([sys.executable, __file__, *one], check=True)


if __name__ == "__main__":
    main()
