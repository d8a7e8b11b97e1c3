"""Measure the time of commands that need no model: help, lists, and error messages.

    python benchmarks/startup.py [--repeats 7] [--out FILE]

Each command line is run several times as a separate process. `seconds` is the best wall-clock time.
`cpu_seconds` is the least processor time, which depends less on other programs on the machine.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

LINES = (
    "--version",
    "--help",
    "methods",
    "runs",
    "run --help",
    "run dpo --help",
    "run pairwise-cringe --help",
    "rnus",
    "run dpoo --data x",
    "run dpo --data x --betta 1",
    "run dpo --data x --beta -1",
    "run dpo --data x --beta",
    "run dpo --beta 1",
    "run dpo --config bad.yaml",
)
ALLOWED, GOAL = 0.5, 0.25
"""Seconds on two cores: the limit for every command line, and the goal."""


def measured(line: str, folder: Path, repeats: int) -> dict[str, float]:
    """Return the best times of one command line, after one start that fills the caches."""
    command = [sys.executable, "-m", "palate", *line.split()]
    walls, processor = [], []
    for _ in range(repeats + 1):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
        walls.append(time.perf_counter() - began)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode in (0, 2), done.stderr.decode()
    return {"seconds": round(min(walls[1:]), 3), "cpu_seconds": round(min(processor[1:]), 3)}


def table(found: dict[str, dict[str, float]]) -> str:
    """Return the times as a Markdown table."""
    rows = [f"| `palate {line}` | {t['seconds']:.2f} | {t['cpu_seconds']:.2f} |" for line, t in found.items()]
    return "\n".join(["| command line | seconds | processor seconds |", "|---|---|---|", *rows])


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "bad.yaml").write_text("data: x\n\tbeta: 1\n")
        found = {line: measured(line, Path(name), given.repeats) for line in LINES}
    slowest = max(found, key=lambda line: found[line]["seconds"])
    result = {
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "repeats": given.repeats,
        "allowed_seconds": ALLOWED,
        "goal_seconds": GOAL,
        "slowest": slowest,
        "times": found,
    }
    print(table(found))
    print(json.dumps(result))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
