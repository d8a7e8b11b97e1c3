"""Runs of two processes from the command line: three ways to start, a kill, a resume, and other data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from palate.testing import tiny_model

STEPS = 5


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tiny_model(tmp_path / "model")
    rows = [{"prompt": f"say {i}", "chosen": "yes" * (1 + i % 3), "rejected": f"no {i}"} for i in range(7)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "model": tmp_path / "model",
        "data": tmp_path / "pairs.jsonl",
        "dtype": "float32",
        "lr": "1e-3",
        "batch-size": "3",
        "epochs": "2",
        "checkpoint-every": "1",
    }
    return ["run", "dpo", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]


def states(directory: Path) -> dict[str, bytes]:
    last = max((directory / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    assert last.name == f"step-{STEPS}"
    return {p.name: p.read_bytes() for p in last.glob("*.safetensors")}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    started, environ = [sys.executable, "-m", *command], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(started, env=environ, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.parametrize("sharding", [["--sharding", "none"], ["--sharding", "full", "--no-lora"]])
def test_a_run_whose_process_is_killed_ends_as_one_that_is_not(
    tmp_path: Path, command: list[str], start: Any, sharding: list[str]
) -> None:
    command = [*command, *sharding]
    # Three ways to start: torchrun, the environment of any launcher, and palate itself.
    whole = run(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "palate"),
        *(*command, "--output", str(tmp_path / "whole")),
    )
    assert whole.returncode == 0, whole.stderr
    cut = ["--output", str(tmp_path / "cut")]
    first, second = start("palate", *command, *cut, DIE="1:4")
    assert (first.returncode, second.returncode) == (2, -9), first.stderr
    assert "palate: process 1 of 2 ended without an error message" in first.stderr
    assert not (tmp_path / "cut" / "checkpoints" / "step-4").exists()
    resumed = run("palate", *command, *cut, "--processes", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("resuming after step 3") == 1
    assert "not be bit-identical" not in resumed.stderr
    assert states(tmp_path / "cut") == states(tmp_path / "whole")


def test_a_sharded_run_resumes_in_one_process_and_says_so(
    tmp_path: Path, command: list[str], start: Any
) -> None:
    cut = ["--output", str(tmp_path / "cut"), "--sharding", "full"]
    first, second = start("palate", *command, *cut, DIE="0:3")
    assert (first.returncode, second.returncode) == (-9, 2), second.stderr
    assert "palate: process 0 of 2 ended without an error message" in second.stderr
    written = tmp_path / "cut" / "checkpoints" / "step-2"
    assert len(list(written.glob("state-*-of-00002.safetensors"))) == 2
    cut[-1] = "none"
    resumed = run("palate", *command, *cut)
    assert resumed.returncode == 0, resumed.stderr
    assert "processes was 2 and is 1" in resumed.stderr
    assert "sharding was 'full' and is 'none'" in resumed.stderr
    whole = run("palate", *command, "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    expected, reached = (
        load_file(tmp_path / name / "checkpoints" / f"step-{STEPS}" / "state.safetensors")
        for name in ("whole", "cut")
    )
    assert expected.keys() == reached.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(reached[name], tensor, rtol=0, atol=1e-5)


def test_a_process_with_other_data_is_refused_by_name(tmp_path: Path, command: list[str], start: Any) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    text = (tmp_path / "pairs.jsonl").read_text()
    for place, own in zip(places, (text, text.replace("yes", "Yes", 1)), strict=True):
        place.mkdir()
        (place / "pairs.jsonl").write_text(own)
    command[command.index("--data") + 1] = "pairs.jsonl"
    ended = start("palate", *command, "--output", str(tmp_path / "run"), directories=places)
    assert [one.returncode for one in ended] == [2, 2]
    said = [line for one in ended for line in one.stderr.splitlines() if line.startswith("palate:")]
    assert len(said) == 1  # one process says it for both
    assert said[0].startswith("palate: the data differs between the processes: process 1 of 2 has ")


def test_palate_train_does_not_start_processes(tmp_path: Path, command: list[str]) -> None:
    code = "import palate; palate.train('dpo', data='x', model='y', processes=2)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "processes is 2, but 1 is running; use `palate run METHOD --processes 2`" in ended.stderr
