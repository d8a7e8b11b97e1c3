"""Figures in the documents are those that the scripts made."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import runpy, sys

_, folder, *scripts = sys.argv
sys.path.insert(0, folder)
for script in scripts:
    sys.argv = [script, "--check"]
    try:
        runpy.run_path(f"{folder}/{script}.py", run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            print(f"{script}: {ended.code}")
"""
"""One process for all scripts of a folder, since each would load torch."""


@pytest.mark.parametrize(
    ("folder", "scripts"),
    [
        (
            "experiments",
            (
                *("annotator_strength", "comparison", "coverage", "criteria"),
                *("demo", "measured", "rl", "rollouts", "self_rewarding"),
            ),
        ),
        ("benchmarks", ("tables", "plan")),
    ],
)
def test_the_documents_have_what_the_scripts_write(folder: str, scripts: Sequence[str]) -> None:
    checked = subprocess.run(
        [sys.executable, "-c", CHECK, str(ROOT / folder), *scripts],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout) == (0, ""), checked.stderr
