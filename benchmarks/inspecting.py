"""Measure `palate inspect` on a large file: it reads, renders, tokenises and checks every row.

    python benchmarks/inspecting.py [--rows 10000] [--repeats 3] [--output FILE]

The rows are pairs: prompts of the package's own set, and answers of 60 and 40 words. Each repeat is a process
of its own, so the time of its start is part of the figure. `startup` is the same command on a file with one
row.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import arguments, finish

from palate import data

MODEL = "smollm2"


def write(path: Path, count: int) -> None:
    """Write a file with this many pairs."""
    prompts = data.read_prompts("everyday")
    words = " ".join(prompt.text for prompt in prompts).split()
    random_ = random.Random(0)
    data.write_rows(
        path,
        (
            {
                "prompt": f"{prompts[i % len(prompts)].text} ({i})",
                "chosen": " ".join(random_.choices(words, k=60)),
                "rejected": " ".join(random_.choices(words, k=40)),
            }
            for i in range(count)
        ),
    )


def seconds(path: Path) -> float:
    """The wall-clock time of one command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "palate", "inspect", str(path), "--model", MODEL, "--method", "dpo"]
    subprocess.run([*command, "--rows", "1"], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    given = arguments(
        str(__doc__), rows={"type": int, "default": 10_000}, repeats={"type": int, "default": 3}
    )
    with tempfile.TemporaryDirectory() as name:
        small, large = Path(name) / "small.jsonl", Path(name) / "large.jsonl"
        write(small, 1)
        write(large, given.rows)
        seconds(small)  # fills the caches
        startup = [seconds(small) for _ in range(given.repeats)]
        whole = [seconds(large) for _ in range(given.repeats)]
    figures = {"startup": statistics.median(startup), "seconds": statistics.median(whole)}
    finish(given, {"rows": given.rows, "startup": startup, "seconds": whole}, figures)


if __name__ == "__main__":
    main()
