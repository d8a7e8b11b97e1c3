"""Training runs in processes of their own, several at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from palate.errors import PalateError, RunError
from palate.run import Display
from palate.rundir import read_status, read_summary
from palate.rundir.writing import writing

MEGABYTE = 1 << 10
"""Units of `ru_maxrss` (kibibytes on Linux) in a mebibyte."""


@dataclass(frozen=True)
class Job:
    """One training run.

    Attributes:
        name: name of the run's directory, such as `oaif-0`.
        arm: name of the arm.
        seed: its seed.
        method: name of the method.
        values: its configuration, without the output.
        directory: the run's directory.
    """

    name: str
    arm: str
    seed: int
    method: str
    values: Mapping[str, Any]
    directory: Path


def train_all(jobs: Sequence[Job], root: Path, *, at_once: int, display: Display) -> None:
    """Do the runs that are not finished, `at_once` at a time; they share the processor's cores.

    Raises:
        RunError: a run failed; the others have been finished.
    """
    waiting = [job for job in jobs if not finished(job)]
    failed: list[str] = []
    with ThreadPoolExecutor(at_once) as pool:
        for job, problem in pool.map(lambda job: (job, _train(job, root, at_once, display)), waiting):
            if problem:
                failed.append(f"{job.name} ({problem})")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(waiting)} runs failed: {', '.join(failed)}; the same command again "
            "resumes them; to do without a method, leave it out of --methods"
        )


def finished(job: Job) -> bool:
    """Return True if the run has its results."""
    try:
        return read_status(job.directory).state == "finished" and read_summary(job.directory) is not None
    except PalateError:
        return False


def usage(job: Job) -> dict[str, float]:
    """Return processor seconds, summed over all attempts, and peak memory in GB."""
    file = _usage_file(job)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    return {
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),
        "peak_memory_gb": max((row["peak_memory_gb"] for row in rows), default=float("nan")),
    }


def _train(job: Job, root: Path, at_once: int, display: Display) -> str:
    """Do one run; return an empty text, or the last line of its error."""
    config = root / "configs" / f"{job.name}.yaml"
    log = root / "logs" / f"{job.name}.log"
    for file in (config, log):
        file.parent.mkdir(parents=True, exist_ok=True)
    with writing(config):
        config.write_text(yaml.safe_dump(_plain(job.values), sort_keys=True, allow_unicode=True), "utf-8")
    cores = max(1, (os.cpu_count() or 1) // at_once)
    line = [sys.executable, "-m", "palate", "run", job.method, "--config", str(config)]
    began = time.perf_counter()
    display.say(f"{job.name}: training")
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*line, "--output", str(job.directory)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))},
        )
        try:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:  # interrupted: the run saves its state and ends, too
                process.terminate()
    row = {
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_memory_gb": round(used.ru_maxrss * _unit() / 1e9, 3),
    }
    with _usage_file(job).open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    if process.returncode == 0:
        display.say(f"{job.name}: finished after {time.perf_counter() - began:.0f} s")
        return ""
    lines = [text for text in log.read_text("utf-8", errors="replace").splitlines() if text.strip()]
    return f"exit code {process.returncode}, {lines[-1] if lines else 'no message'}; see {log}"


def _usage_file(job: Job) -> Path:
    return job.directory.parent / f"{job.name}.usage.jsonl"


def _unit() -> int:
    return 1 if sys.platform == "darwin" else MEGABYTE


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
