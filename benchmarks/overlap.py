"""Overlap: seconds per step of oaif with a judge on a server that answers after 200 ms.

Three settings: judge after sampling; judge while sampling (the default); judge while sampling and learning
(`--ahead 1`). The server is on this machine and computes nothing. The first step of each run is left out.
Fewer rows are sampled at once than a step has completions, as on a real machine with a real batch, so that
groups end one after another and the judge can begin early.

    python benchmarks/overlap.py --output benchmarks/results/overlap.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))

import palate
from machine import machine
from palate.quiet import quiet_libraries
from palate.testing import FaultyServer, judge_reply

LATENCY = 0.2
"""Seconds before each answer."""
SETTINGS: dict[str, dict[str, Any]] = {
    "after sampling": {},
    "while sampling": {},
    "while sampling and learning": {"ahead": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sampling-rows", type=int, default=8)
    parser.add_argument("--concurrency", type=int, default=2)
    args = parser.parse_args()
    quiet_libraries()
    os.environ["OVERLAP_KEY"] = "none"
    work = Path(tempfile.mkdtemp())
    rows = []
    for name, setting in SETTINGS.items():
        with FaultyServer(
            lambda body, number: judge_reply(body, lambda a, b: 0.8 if len(a) > len(b) else 0.2),
            delay=lambda number: LATENCY,
        ) as server:
            begin = patch("palate.loops.stage.beginning", lambda annotate: None)
            if name == "after sampling":
                begin.start()
            outcome = palate.train(
                "oaif", output=work / name.replace(" ", "-"), model=args.model, data="everyday",
                steps=args.steps, batch_size=args.batch_size, n=2, max_new_tokens=args.max_new_tokens,
                sampling_rows=args.sampling_rows, dtype=args.dtype, lr=1e-6,
                judge=f"server:m@{server.url}", judge_key_env="OVERLAP_KEY", probe_pairs=0, fresh_prompts=0,
                judge_concurrency=args.concurrency, display=None, **setting,
            )  # fmt: skip
            if name == "after sampling":
                begin.stop()
        rows.append({"judge": name, **seconds(outcome.directory)})
        print(json.dumps(rows[-1]), flush=True)
    fixed = {key: value for key, value in vars(args).items() if key != "output"}
    result = {"latency": LATENCY, **fixed, "rows": rows, "machine": machine()}
    if args.output is not None:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def seconds(directory: Path) -> dict[str, float]:
    """Median seconds of a step and of its parts, without the first step."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row for row in map(json.loads, lines) if row["step"] > 1]
    names = sorted(name for name in steps[0] if name.startswith("time/"))
    parts = {name: round(statistics.median(row.get(name, 0.0) for row in steps), 3) for name in names}
    whole = statistics.median(sum(row.get(name, 0.0) for name in names) for row in steps)
    return {"seconds": round(whole, 3), **parts}


if __name__ == "__main__":
    main()
