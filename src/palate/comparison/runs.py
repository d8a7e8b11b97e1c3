"""Training runs in processes of their own, several at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import yaml

from palate.errors import PalateError, RunError
from palate.run import Display
from palate.rundir import read_status, read_summary
from palate.rundir.writing import writing

MEGABYTE = 1 << 10
"""Units of `ru_maxrss` (kibibytes on Linux) in a mebibyte."""

NONFINITE = "nonfinite.jsonl"
"""File of a run that ended since its losses were not finite."""

POLL = 0.1
"""Seconds between two looks at a run's memory."""

GRACE, LAST = 60.0, 20.0
"""Seconds for an interrupted run to save its state, and to end after SIGTERM."""


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


class _Children:
    """The running processes, which end when the comparison is interrupted."""

    def __init__(self) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def __enter__(self) -> Self:
        """Wait for the runs."""
        return self

    def __exit__(self, *_: object) -> None:
        """Interrupt the runs that are left, so that they save their state; end those that take too long."""
        self.stopping = True
        for number, wait in ((signal.SIGINT, GRACE), (signal.SIGTERM, LAST), (signal.SIGKILL, 0.0)):
            for process in list(self.running):
                process.send_signal(number)
            until = time.monotonic() + wait
            while self.running and time.monotonic() < until:
                time.sleep(0.05)


def train_all(
    jobs: Sequence[Job], root: Path, *, at_once: int, display: Display, may_diverge: bool = False
) -> list[str]:
    """Do the runs that are not finished, `at_once` at a time; they share the processor's cores.

    Ctrl-C and SIGTERM interrupt the running ones, which save their state; no other run starts then.

    Args:
        jobs: the runs.
        root: directory for their configurations and logs.
        at_once: number of runs at the same time.
        display: for progress.
        may_diverge: a run whose losses are not finite does not count as failed.

    Returns:
        The names of the runs that diverged.

    Raises:
        RunError: a run failed; the others have been finished.
    """
    waiting = [job for job in jobs if not finished(job)]
    children, failed, diverged = _Children(), [], []
    with _terminable(), ThreadPoolExecutor(at_once) as pool, children:
        doing = [(job, pool.submit(_train, job, root, at_once, display, children)) for job in waiting]
        for job, problem in doing:
            if not (said := problem.result()):
                continue
            if may_diverge and (job.directory / NONFINITE).exists():
                diverged.append(job.name)
                display.say(f"{job.name}: not counted, since its losses were not finite")
            else:
                failed.append(f"{job.name} ({said})")
    if failed:
        raise RunError(
            f"{len(failed)} of {len(waiting)} runs failed: {', '.join(failed)}; the same command again "
            "resumes them; to do without a method, leave it out of --methods"
        )
    return diverged


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, where signals can be handled: in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def finished(job: Job) -> bool:
    """Return True if the run has its results."""
    try:
        return read_status(job.directory).state == "finished" and read_summary(job.directory) is not None
    except PalateError:
        return False


def usage(job: Job) -> dict[str, float]:
    """Return processor seconds, summed over all attempts, and peak memory in GB.

    The time is NaN if an attempt was killed before its own could be written.
    """
    file = _usage_file(job)
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []
    ended = [row for row in rows if "cpu_seconds" in row]
    known = ended and len(rows) - len(ended) <= len(ended)
    return {
        "cpu_seconds": sum(row["cpu_seconds"] for row in ended) if known else float("nan"),
        "peak_memory_gb": max((row["peak_memory_gb"] for row in ended), default=float("nan")),
    }


def _train(job: Job, root: Path, at_once: int, display: Display, children: _Children) -> str:
    """Do one run; return an empty text, or the last line of its error."""
    if children.stopping:
        return "not started"
    config = root / "configs" / f"{job.name}.yaml"
    log = root / "logs" / f"{job.name}.log"
    for file in (config, log):
        file.parent.mkdir(parents=True, exist_ok=True)
    with writing(config):
        config.write_text(yaml.safe_dump(_plain(job.values), sort_keys=True, allow_unicode=True), "utf-8")
    began = time.perf_counter()
    display.say(f"{job.name}: training")
    _note(job, {"began": time.strftime("%FT%T%z")})
    code = _run(job, config, log, max(1, (os.cpu_count() or 1) // at_once), children)
    if code == 0:
        display.say(f"{job.name}: finished after {time.perf_counter() - began:.0f} s")
        return ""
    lines = [text for text in log.read_text("utf-8", errors="replace").splitlines() if text.strip()]
    return f"exit code {code}, {lines[-1] if lines else 'no message'}; see {log}"


def _run(job: Job, config: Path, log: Path, cores: int, children: _Children) -> int:
    """Run the process, note its usage, and return its exit code."""
    line = [sys.executable, "-m", "palate", "run", job.method, "--config", str(config)]
    with log.open("ab") as out:
        process = subprocess.Popen(
            [*line, "--output", str(job.directory)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))},
            start_new_session=True,  # a terminal's Ctrl-C reaches it once, from here
        )
    children.running.add(process)
    if children.stopping:
        process.send_signal(signal.SIGINT)
    try:
        peak = 0
        while True:
            peak = max(peak, _high_water(process.pid))
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
            if ended:
                break
            time.sleep(POLL)
    finally:
        children.running.discard(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    _note(
        job,
        {
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
            "peak_memory_gb": round((peak or used.ru_maxrss * _unit()) / 1e9, 3),
        },
    )
    return process.returncode


def _high_water(process: int) -> int:
    """Return the peak memory of a running process in bytes; 0 if the system does not report it.

    What a process has used at its end also counts the memory of its parent, from before it became its own
    program.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text("ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * MEGABYTE for line in lines if line.startswith("VmHWM")), 0)


def _note(job: Job, row: Mapping[str, Any]) -> None:
    file = _usage_file(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


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
