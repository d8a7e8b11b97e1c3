"""Figures in the documents are those that the scripts made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "script",
    [
        "experiments/annotator_strength.py",
        "experiments/comparison.py",
        "experiments/coverage.py",
        "experiments/criteria.py",
        "experiments/demo.py",
        "experiments/rl.py",
        "experiments/rollouts.py",
        "experiments/self_rewarding.py",
        "benchmarks/tables.py",
        "benchmarks/plan.py",
    ],
)
def test_the_documents_have_what_the_script_writes(script: str) -> None:
    told = subprocess.run(
        [sys.executable, str(ROOT / script), "--check"], check=False, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
