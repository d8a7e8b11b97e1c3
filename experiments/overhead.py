"""Measure the cost of a run's journal, checkpoints and status files as a share of its time.

The script runs a configuration once (default: the demo), adds up the time spent in these parts, and writes it
together with the time of the whole run.

    python experiments/overhead.py --output experiments/results/overhead.json
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import palate
from machine import machine
from palate.journal import Journal
from palate.quiet import quiet_libraries
from palate.run import run as running
from palate.run.checkpoints import Checkpoints
from palate.settings import load_config

SPENT: defaultdict[str, float] = defaultdict(float)
COUNTS: defaultdict[str, int] = defaultdict(int)
_inside: list[str] = []


def counted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its time is counted, unless another counted function calls it."""

    @functools.wraps(plain)
    def wrapped(*given: Any, **options: Any) -> Any:
        if _inside:
            return plain(*given, **options)
        _inside.append(name)
        began = time.perf_counter()
        try:
            return plain(*given, **options)
        finally:
            SPENT[name] += time.perf_counter() - began
            COUNTS[name] += 1
            _inside.pop()

    return wrapped


def watch() -> None:
    """Count the time of all functions that make a run durable."""
    for cls, name in ((Journal, "journal"), (Checkpoints, "checkpoints")):
        for method, plain in list(vars(cls).items()):
            if callable(plain) and (method == "__init__" or not method.startswith("_")):
                setattr(cls, method, counted(name, plain))
    running.fingerprint = counted("fingerprint", running.fingerprint)
    running.Run._note = counted("status", running.Run._note)
    running.write_exports = counted("exports", running.write_exports)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--method", default="oaif")
    given = parser.parse_args()
    quiet_libraries()
    watch()
    with tempfile.TemporaryDirectory() as folder:
        cls = palate.METHODS[given.method].config
        cfg = load_config(cls, file=given.config, flags={"output": str(Path(folder) / "run")})
        outcome = palate.train(given.method, cfg)
        size = sum(p.stat().st_size for p in outcome.run.directory.rglob("*") if p.is_file())
        seconds = outcome.run.seconds
    total = sum(SPENT.values())
    found = {
        "machine": machine(),
        "config": str(given.config),
        "seconds": round(seconds, 1),
        "spent": {name: {"seconds": round(s, 3), "calls": COUNTS[name]} for name, s in SPENT.items()},
        "share": round(total / seconds, 5),
        "directory_mb": round(size / 1e6, 1),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
