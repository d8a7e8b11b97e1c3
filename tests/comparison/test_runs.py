"""Runs in processes of their own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from palate.comparison.runs import Job, finished, train_all, usage
from palate.errors import RunError
from palate.run import Display
from palate.rundir import read_status


def job(tiny: str, root: Path, name: str = "sft-0", **values: Any) -> Job:
    data = root / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"q{i}", "completion": "yes"}) + "\n" for i in range(4)))
    base = {
        "model": tiny, "data": str(data), "steps": 2, "batch_size": 2, "device": "cpu", "dtype": "float32",
        "fresh_prompts": 0, "seed": 0,
    }  # fmt: skip
    return Job(name, name, 0, "sft", {**base, **values}, root / "runs" / name)


def test_runs_are_done_once_and_a_failure_names_its_log(tiny: str, tmp_path: Path) -> None:
    good, bad = job(tiny, tmp_path), job(tiny, tmp_path, "bad-0", data=str(tmp_path / "none.jsonl"))
    with pytest.raises(RunError, match=r"1 of 2 runs failed: bad-0 \(exit code 2"):
        train_all([good, bad], tmp_path, at_once=2, display=Display(quiet=True))
    assert finished(good)
    assert not finished(bad)
    assert (tmp_path / "logs" / "bad-0.log").exists()
    used = usage(good)
    assert used["cpu_seconds"] > 0
    assert used["peak_memory_gb"] > 0.05
    train_all([good], tmp_path, at_once=1, display=Display(quiet=True))
    assert usage(good) == used, "a finished run is not started again"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak memory of a running process")
def test_the_memory_of_the_comparison_is_not_counted_as_a_runs(tiny: str, tmp_path: Path) -> None:
    good = job(tiny, tmp_path)
    large = bytearray(b"x") * 3_000_000_000
    train_all([good], tmp_path, at_once=1, display=Display(quiet=True))
    del large
    assert 0.05 < usage(good)["peak_memory_gb"] < 2.5


def test_a_run_that_diverges_is_named_where_it_may(tiny: str, tmp_path: Path) -> None:
    bad = job(tiny, tmp_path, lr=1e30, steps=60, lora=False)
    made = train_all([bad], tmp_path, at_once=1, display=Display(quiet=True), may_diverge=True)
    assert made == ["sft-0"]
    with pytest.raises(RunError, match=r"1 of 1 runs failed: sft-0"):
        train_all([bad], tmp_path, at_once=1, display=Display(quiet=True))


def test_the_time_of_a_killed_attempt_is_unknown(tiny: str, tmp_path: Path) -> None:
    good = job(tiny, tmp_path)
    file = tmp_path / "runs" / "sft-0.usage.jsonl"
    file.parent.mkdir()
    assert math.isnan(usage(good)["cpu_seconds"])
    file.write_text('{"began": "x"}\n{"began": "x"}\n{"cpu_seconds": 2.0, "peak_memory_gb": 0.5}\n')
    assert math.isnan(usage(good)["cpu_seconds"])
    assert usage(good)["peak_memory_gb"] == 0.5
    with file.open("a") as more:
        more.write('{"cpu_seconds": 3.0, "peak_memory_gb": 0.4}\n')
    assert usage(good) == {"cpu_seconds": 5.0, "peak_memory_gb": 0.5}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_interrupts_its_runs(tiny: str, tmp_path: Path, number: int) -> None:
    """The signal goes to the parent only; the runs save their state and end with it."""
    long = job(tiny, tmp_path, steps=100_000, checkpoint_every=50)
    told = {"name": long.name, "values": dict(long.values), "directory": str(long.directory)}
    (tmp_path / "job.json").write_text(json.dumps(told))
    code = """
import json, signal, sys
from pathlib import Path
from palate.comparison.runs import Job, train_all
from palate.run import Display
from palate.rundir import read_status
signal.signal(signal.SIGINT, signal.default_int_handler)
told = json.load(open("job.json"))
one = Job(told["name"], told["name"], 0, "sft", told["values"], Path(told["directory"]))
train_all([one], Path("."), at_once=1, display=Display(quiet=True))
"""
    begun = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    metrics = long.directory / "metrics.jsonl"
    while begun.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 5):
        time.sleep(0.05)
    os.kill(begun.pid, number)
    assert begun.wait(60) != 0
    assert read_status(long.directory).state == "interrupted"
    assert usage(long)["cpu_seconds"] > 0


def test_a_killed_comparison_resumes(tiny: str, tmp_path: Path) -> None:
    """Kill the whole process group in the middle; the same command again finishes."""
    rows = "".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(12))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "test.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Other {i}?"}) + "\n" for i in range(4))
    )
    line = [
        sys.executable, "-m", "palate", "compare", "--methods", "oaif,dpo", "--seeds", "1",
        "--data", "train.jsonl", "--eval-data", "test.jsonl", "--eval-split", "train",
        "--reward", "length:2", "--budget-steps", "2", "--batch-size", "2", "--lr", "0.01",
        "--model", tiny, "--max-new-tokens", "4", "--points", "1",
        "--device", "cpu", "--dtype", "float32", "--output", "c", "--json",
    ]  # fmt: skip
    begun = subprocess.Popen(line, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (tmp_path / "c" / "logs").exists() and begun.poll() is None:
        time.sleep(0.05)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "c" / "summary.json").exists()
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [row["name"] for row in result["methods"]] == ["oaif", "dpo"]
    assert (tmp_path / "c" / "report.html").exists()
