"""Shared parts of the benchmarks: competing sides in separate processes, and a record of the machine.

A side is a worker process. It loads its model once, then does one measured piece of work for each line of
input. The parent calls the sides in turns, so that noise on the machine affects all sides, and takes medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

with suppress(ImportError):  # the environment of vLLM has no Palate
    import palate  # bounds the spinning of threads in all sides, before torch is loaded

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Side:
    """A worker process. `ask` makes it do one piece of work and returns its measurements.

    Args:
        name: the side's name in the results.
        script: a script of this directory; it is started with `--worker` and the arguments.
        python: the Python interpreter of the worker's environment.
        path: a directory of packages that takes precedence over the environment; see `peer`.
        environment: variables of its environment that differ from this process's.
    """

    def __init__(
        self,
        name: str,
        script: str,
        *arguments: str,
        python: str = sys.executable,
        path: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._log = open(os.devnull, "w")  # noqa: SIM115 - closed with the process
        whole = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(environment or {}),
        }
        if path is not None:
            whole["PYTHONPATH"] = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [python, str(HERE / script), "--worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log if "PALATE_BENCH_VERBOSE" not in os.environ else None,
            text=True,
            env=whole,
        )
        self._read()  # the worker says when it is ready

    def ask(self, **work: Any) -> dict[str, Any]:
        """Do one piece of work."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@@"):
                return json.loads(line[2:])
        raise SystemExit(
            f"{self.name} ended with {self._process.wait()}; set PALATE_BENCH_VERBOSE=1 to see why"
        )


def serve(work: Callable[..., Mapping[str, Any]]) -> None:
    """Run a worker's loop: read a line of JSON, do the work, print a line of JSON."""
    print("@@{}", flush=True)
    for line in sys.stdin:
        print("@@" + json.dumps(work(**json.loads(line))), flush=True)


def in_turns(sides: list[Side], runs: int, **work: Any) -> dict[str, list[dict[str, Any]]]:
    """Call every side once for warm-up, then all sides in turns, each time with another seed."""
    found: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for side in sides:
        side.ask(**work)
    for seed in range(1, runs + 1):
        for side in sides:
            found[side.name].append(side.ask(seed=seed, **work))
            say(f"  {side.name}: {found[side.name][-1]}")
    return found


def runs_of(ending: str, runs: int) -> int:
    """Return the number of runs with natural endings; completions of full length get `runs` runs."""
    return (runs + 1) // 2 if ending == "natural" else runs


def median(rows: list[dict[str, Any]], key: str) -> float:
    """Return the median of one measured number over the runs."""
    return statistics.median(row[key] for row in rows)


def on_gpu() -> bool:
    """Return True if the sides compute on a GPU: they do if the machine has one."""
    import torch

    return torch.cuda.is_available()


def clock() -> float:
    """Return the time in seconds, after all pending GPU work is done."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class PeakMemory:
    """Measure the peak memory of this process in bytes while the context is open.

    On a GPU it counts the memory of tensors, else anonymous memory, which excludes mapped files.
    """

    def __enter__(self) -> PeakMemory:
        if on_gpu():
            import torch

            torch.cuda.reset_peak_memory_stats()
            return self
        self.bytes = anonymous_memory()
        self._open = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if on_gpu():
            import torch

            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._open = False
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_memory())

    def _watch(self) -> None:
        while self._open:
            self.bytes = max(self.bytes, anonymous_memory())
            time.sleep(0.02)


def peer(requirement: str) -> Path | None:
    """Return a directory with `package==version`; None if this environment has the package."""
    package, version = requirement.split("==")
    try:
        if metadata.version(package) == version:
            return None
    except metadata.PackageNotFoundError:
        pass
    place = ROOT / "build" / "peers" / requirement
    if not place.exists():
        say(f"installing {requirement} in {place}")
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                str(place),
                requirement,
            ],
            check=True,
            stdout=sys.stderr,
        )
    return place


def compute_dtype(name: str) -> str:
    """Resolve `auto` to Palate's default here: bfloat16 if the processor computes in it, else float32."""
    from palate.config import ModelConfig
    from palate.model.device import resolve

    return str(resolve(ModelConfig.model_validate({"dtype": name}))[1]).removeprefix("torch.")


def anonymous_memory() -> int:
    """Return the anonymous resident memory of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no RssAnon; this needs Linux")


def gemm_peak(dtype_name: str = "bfloat16", seconds: float = 2.0) -> float:
    """Return the best rate of a large matrix product here, in FLOP/s, over some shapes."""
    import torch

    device = "cuda" if on_gpu() else "cpu"
    dtype = getattr(torch, dtype_name)
    best = 0.0
    for m, k, n in ((2048, 2048, 2048), (4096, 1024, 4096), (2048, 576, 49152), (2048, 576, 1536)):
        a, b = torch.randn(m, k).to(device, dtype), torch.randn(n, k).to(device, dtype)
        torch.nn.functional.linear(a, b)
        until = clock() + seconds / 4
        while clock() < until:
            began = clock()
            torch.nn.functional.linear(a, b)
            best = max(best, 2 * m * k * n / (clock() - began))
    return best


def arguments(doc: str, **more: Mapping[str, Any]) -> argparse.Namespace:
    """Parse a benchmark's command line: --json, --runs and its own flags."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the result to this file")
    for name, options in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    given = parser.parse_args()
    global _quiet
    _quiet = given.json
    return given


_quiet = False


COMPILE = {
    "choices": ["on", "off"],
    "help": "whether Palate uses compiled functions; default: on where a compiler is found",
}
"""The argument `--compile` of scripts."""


def compiling(choice: str | None) -> str:
    """Return whether Palate's sides compile: the choice, or `on` where that is possible."""
    import torch

    from palate.model.compiling import obstacle

    if choice is not None:
        return choice
    reason = obstacle(torch.device("cuda" if on_gpu() else "cpu"))
    if reason is not None:
        say(f"without compiled functions: {reason}")
    return "off" if reason else "on"


def say(text: str) -> None:
    """Print progress on standard error."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def finish(given: argparse.Namespace, detail: Mapping[str, Any], last: Mapping[str, float]) -> None:
    """Print the details, then the main figures as the last line."""
    sys.path.insert(0, str(ROOT / "experiments"))
    from machine import machine

    whole = {"machine": machine(), "of": {"commit": commit(), **versions()}, **detail, "figures": last}
    if given.output is not None:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(whole, indent=2) + "\n")
    print(json.dumps(whole) if given.json else json.dumps(whole, indent=2))
    print(json.dumps(last))


def commit() -> str | None:
    """Return the git commit in a git clone, with `+` for uncommitted changes."""
    if shutil.which("git") is None:
        return None
    told = subprocess.run(
        ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    return told.stdout.strip() or None


def versions() -> dict[str, str]:
    """Return the versions of the compared libraries in this environment."""
    return {name: metadata.version(name) for name in ("transformers", "numpy")}


def prompts(count: int, tokens: int) -> list[str]:
    """Return distinct English prompts of about `tokens` tokens, joined from prompts shipped with Palate."""
    texts = [prompt.text for prompt in palate.read_prompts("everyday")]
    each = max(1, round((tokens - 30) / 11))  # the chat template takes about 30, a prompt about 11
    return [" ".join(texts[(i * each + j) % len(texts)] for j in range(each)) for i in range(count)]
