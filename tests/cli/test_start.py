"""Paths that answer at once load no library that is slow to load. `benchmarks/startup.py` has their times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import palate
from palate.methods import METHODS

SLOW = {"torch", "transformers", "numpy", "scipy", "datasets", "pyarrow", "peft", "accelerate", "matplotlib"}

PROGRAM = """
import sys
from palate.cli import main
code = main(sys.argv[1:])
print(*sys.modules, file=open("modules.txt", "w"))
sys.exit(code)
"""


def loaded(folder: Path, *words: str, code: int) -> set[str]:
    """The top-level modules that a command line has loaded in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(Path(str(palate.__file__)).parents[1])}
    line = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == (code == 2), done.stderr
    return {name.split(".")[0] for name in (folder / "modules.txt").read_text().split()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a finished run, a run that says that it is running, and bad YAML."""
    for name, state in (("one", "finished"), ("two", "running")):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.json").write_text(json.dumps({"method": "dpo", "config": {}, "versions": {}}))
        (run / "status.json").write_text(json.dumps({"state": state}))
        (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
        (run / ".lock").touch()
    (tmp_path / "bad.yaml").write_text("data: x\n\tbeta: 1\n")
    (tmp_path / "near.yaml").write_text("data: x\nbetta: 1\n")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "--version",
        "--help",
        "methods",
        "methods --json",
        "runs",
        "runs --json",
        "run --help",
        "sample --help",
        "chat --help",
        "report --help",
        "inspect --help",
        *(f"run {name} --help" for name in METHODS),
    ],
)
def test_what_answers_at_once(folder: Path, line: str) -> None:
    assert not loaded(folder, *line.split(), code=0) & SLOW


@pytest.mark.parametrize(
    "line",
    [
        "--beta",
        "rnus",
        "run dpoo --data x",
        "run dpo --data x --betta 1",
        "run dpo --data x --beta -1",
        "run dpo --data x --beta",
        "run dpo --beta 1",
        "run dpo --config bad.yaml",
        "run dpo --config near.yaml",
        "run dpo --config none.yaml",
        "run rrhf --variant direct --n 7 --data x",
        "sample",
        "sample --prompt a --n 0",
        "chat",
        "chat nowhere",
        "report",
        "report nowhere",
        "inspect",
        "inspect x --rows -1",
        "inspect x --method dpoo",
        "inspect x.jsonl",
        "runs nowhere",
    ],
)
def test_a_mistake_in_the_command_line_is_reported_at_once(folder: Path, line: str) -> None:
    assert not loaded(folder, *line.split(), code=2) & SLOW
