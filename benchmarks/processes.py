"""Measure what two processes lose against one on the same machine and the same work.

    python benchmarks/processes.py --output benchmarks/results/processes.json

Each arm is a whole run of the embedded model: `oaif` (sampling, rewards, updates) and `dpo` (updates only),
with a LoRA adapter. One process has all threads; two processes have half of them each. The figures are
medians of the steps after the first. The messages of process 0 are counted by name: bytes, calls and seconds,
waiting included.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from common import ROOT, arguments, finish, say

STEPS = 6
SHARED = {"steps": STEPS, "batch_size": 8, "lr": 1e-5, "overwrite": True, "fresh_prompts": 0}
ARMS: dict[str, dict[str, Any]] = {
    "oaif": {
        "data": "everyday",
        "limit": 64,
        "eval_data": None,
        "reward": "length:24",
        "n": 2,
        "max_new_tokens": 32,
        "temperature": 1.0,
    },
    "dpo": {"epochs": 2},
}


def work(method: str, folder: Path) -> None:
    """Do a run in this process, and write its steps and its messages."""
    import palate
    from palate.world import current

    settings = {**SHARED, **ARMS[method]}
    if method == "dpo":
        del settings["steps"]
        settings["data"] = str(folder / "pairs.jsonl")
    result = palate.train(method, output=folder / "run", display=None, **settings)
    world = current()
    if world.leads:
        rows = [json.loads(line) for line in (result.directory / "metrics.jsonl").read_text().splitlines()]
        messages = {name: vars(one) for name, one in getattr(world, "traffic", {}).items()}
        (folder / "done.json").write_text(json.dumps({"rows": rows, "messages": messages}))
    sys.stdout.flush()
    os._exit(0)


def measure(method: str, processes: int, threads: int) -> dict[str, Any]:
    """Run an arm, and return seconds per step and the messages per step."""
    from torch.distributed import TCPStore

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.loads(line) for line in (ROOT / "experiments/gold_pairs.jsonl").read_text().splitlines()]
        pairs = [{"prompt": r["prompt"], "chosen": r["better"], "rejected": r["worse"]} for r in rows]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": processes}
        place |= {"LOCAL_WORLD_SIZE": processes, "TORCHELASTIC_USE_AGENT_STORE": True}
        running = []
        for rank in range(processes):
            own = {"RANK": rank, "LOCAL_RANK": rank, **place} if processes > 1 else {}
            environ = {**os.environ, **{k: str(v) for k, v in own.items()}, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, __file__, "--work", method, name]
            running.append(subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL))
        codes = [process.wait(timeout=280) for process in running]
        assert not any(codes), codes
        done = json.loads((folder / "done.json").read_text())
    steps = [row for row in done["rows"] if "step_time" in row][1:]
    parts = sorted({key for row in steps for key in row if key.startswith("time/")} | {"step_time"})
    result = {key: round(statistics.median(row.get(key, 0.0) for row in steps), 3) for key in parts}
    count = len(steps) + 1
    result["messages"] = {
        name: {k: round(v / count, 4) for k, v in one.items()} for name, one in done["messages"].items()
    }
    return result


def main() -> None:
    """Measure all arms."""
    given = arguments(__doc__)
    cores = len(os.sched_getaffinity(0))
    detail: dict[str, Any] = {"cores": cores, "steps": STEPS, "arms": ARMS}
    last: dict[str, float] = {}
    for method in ARMS:
        one, two = measure(method, 1, cores), measure(method, 2, max(1, cores // 2))
        single = measure(method, 1, max(1, cores // 2))
        lost = two["step_time"] / one["step_time"] - 1
        detail[method] = {"one": one, "two": two, "one_with_half_the_threads": single}
        sent = sum(m["bytes"] for m in two["messages"].values())
        times = [one["step_time"], two["step_time"], single["step_time"]]
        say(f"{method}: {times[0]} s a step in one process, {times[1]} s in two ({lost:+.0%}),")
        say(f"  {times[2]} s in one with half the threads; {sent / 1e6:.2f} MB of messages a step")
        last |= {f"{method}_lost": round(lost, 4), f"{method}_megabytes_a_step": round(sent / 1e6, 3)}
    finish(given, detail, last)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], Path(sys.argv[3]))
    main()
