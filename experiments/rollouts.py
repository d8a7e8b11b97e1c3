"""Train the embedded model by `oaif` with completions of a real vLLM server, and kill the server in between.

    python experiments/rollouts.py --output experiments/results/rollouts.json     measures
    python experiments/rollouts.py --write                                        writes the table of the page

It needs an environment with vLLM, whose Python the environment variable PALATE_VLLM_PYTHON names
(docs/scale.md says how to make one). The arms have the same prompts, reward and seed:

- Palate's own engine samples;
- a vLLM server at a URL samples. It is killed (SIGKILL) in the middle of a step, another one is started at
  another address, and the same command resumes the run;
- a vLLM server that the run starts beside itself samples, two steps ahead.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from machine import machine
from marks import missing, write

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results" / "rollouts.json"
PAGE = ROOT / "docs" / "scale.md"
SERVER = ["--max-model-len=512", "--max-num-seqs=32", "--gpu-memory-utilization=0.4"]
KILLED = "vLLM, killed and resumed"
EDGE = 4
"""Steps at each end of a run whose mean rewards are compared."""


def command(output: Path, given: argparse.Namespace, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "palate", "run", "oaif", "--data", "everyday", "--limit", "128"),
        *("--reward", "length:12", "--n", "4", "--temperature", "1", "--max-new-tokens", "24"),
        *("--steps", str(given.steps), "--batch-size", str(given.batch_size), "--lr", "1e-3"),
        *("--dtype", given.dtype, "--checkpoint-every", "4", "--fresh-prompts", "0"),
        *("--output", str(output), *more),
    ]


def rows(output: Path) -> list[dict[str, Any]]:
    path = output / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for row in map(json.loads, lines) if "objective/scores" in row]


def figures(output: Path) -> dict[str, Any]:
    """Return the figures of a finished run."""
    steps = rows(output)
    scores = [row["objective/scores"] for row in steps]
    gaps = [row for row in steps if "sampling/sampling_logp_difference/mean" in row]
    return {
        "steps": len(steps),
        "reward_first": round(mean(scores[:EDGE]), 3),
        "reward_last": round(mean(scores[-EDGE:]), 3),
        "gap_mean": round(mean(row["sampling/sampling_logp_difference/mean"] for row in gaps), 5),
        "gap_max": round(max(row["sampling/sampling_logp_difference/max"] for row in gaps), 4),
        "seconds_per_step": round(mean(row["step_time"] for row in steps[1:]), 1),
    }


def train(output: Path, given: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Do one run to its end, and return its figures."""
    begun = time.monotonic()
    subprocess.run(command(output, given, *more), check=True, stdout=subprocess.DEVNULL)
    found = figures(output) | {"seconds": round(time.monotonic() - begun)}
    print(output.name, json.dumps(found), flush=True)
    return found


def server(log: Path, given: argparse.Namespace) -> tuple[Any, str]:
    """Start a vLLM server for the embedded model, as a person would."""
    from palate.model import embedded_model
    from palate.model.served.process import ServerProcess

    own = ["--model", str(embedded_model()), "--enable-lora", "--max-lora-rank", "16", "--enforce-eager"]
    own += ["--enable-scale-out", "--generation-config", "vllm", "--dtype", given.dtype, "--max-loras", "2"]
    process = ServerProcess(None, [*own, *SERVER], log)
    return process, process.url


def killed(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Kill the server in the middle of a run, and resume the run with another server."""
    output, at = folder / "killed", given.steps // 2
    process, url = server(folder / "first.log", given)
    environ = os.environ | {"VLLM_API_KEY": process.key}
    run = subprocess.Popen(
        command(output, given, "--rollouts", f"vllm:{url}", "--rollout-retries", "2"),
        env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while len(rows(output)) < at and run.poll() is None:
        time.sleep(0.2)
    time.sleep(1.0)  # into the next step
    os.killpg(process._process.pid, signal.SIGKILL)
    said = run.communicate()[1].strip().splitlines()
    before = rows(output)
    process.close()
    process, url = server(folder / "second.log", given)
    try:
        environ = os.environ | {"VLLM_API_KEY": process.key}
        subprocess.run(
            command(output, given, "--rollouts", f"vllm:{url}", "--rollout-retries", "2"),
            check=True, env=environ, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        process.close()
    after = rows(output)
    same = [a["objective/scores"] == b["objective/scores"] for a, b in zip(before, after, strict=False)]
    found = figures(output) | {
        "exit_code": run.returncode,
        "sentence": "palate: " + " ".join(said).rpartition("palate: ")[2],
        "steps_before": len(before),
        "steps_with_the_same_rewards": sum(same),
    }
    print("killed", json.dumps(found), flush=True)
    return found


def table(results: dict[str, Any]) -> list[str]:
    """Return the figures as Markdown."""
    lines = [
        f"| completions by | reward, first {EDGE} steps | last {EDGE} steps | difference to the learner, "
        "mean | largest |",
        "|---|---|---|---|---|",
    ]
    for name, own in results["arms"].items():
        lines.append(
            f"| {name} | {own['reward_first']:.2f} | {own['reward_last']:.2f} | {own['gap_mean']:.5f} | "
            f"{own['gap_max']:.3f} |"
        )
    info, own = results["machine"], results["arms"][KILLED]
    return [
        *lines,
        "",
        f"Measured on {info['date']}: {info['processor']}, {info['cores']} cores, "
        f"{results['dtype']}, {results['steps']} steps of {results['batch_size']} prompts. The server of the "
        f"second row was killed in step {own['steps_before'] + 1}: the run ended with exit code "
        f"{own['exit_code']}, and the same command resumed it with another server. The rewards of "
        f"{own['steps_with_the_same_rewards']} of the {own['steps_before']} steps before the kill stayed the "
        "same.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="directory of the runs; finished ones are not repeated")
    parser.add_argument("--resume", action="store_true", help="keep the arms that OUTPUT has")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.write or given.check:
        parts = {"rollouts": table(json.loads(given.output.read_text(encoding="utf-8")))}
        if given.check:
            old = missing(PAGE, parts)
            sys.exit(f"out of date: {', '.join(old)}" if old else 0)
        write(PAGE, parts)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        beside = ["--rollouts", "vllm", *(f"--vllm-args={argument}" for argument in SERVER), "--ahead", "2"]
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "Palate": lambda: train(folder / "local", given),
            KILLED: lambda: killed(folder, given),
            "vLLM, `--ahead 2`": lambda: train(folder / "ahead", given, *beside),
        }
        results: dict[str, Any] = {"machine": machine(), "dtype": given.dtype, "steps": given.steps}
        results |= {"batch_size": given.batch_size, "arms": {}}
        if given.resume:
            results = json.loads(given.output.read_text(encoding="utf-8"))
        given.output.parent.mkdir(parents=True, exist_ok=True)
        for name, run in work.items():
            results["arms"][name] = results["arms"].get(name) or run()
            given.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
