"""The script for a GPU, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def test_it_runs_on_a_tiny_model(tmp_path: Path) -> None:
    output, table = tmp_path / "gpu.json", tmp_path / "gpu.md"
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(output)]
    done = subprocess.run(
        [*command, "--table", str(table)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    parts = json.loads(output.read_text())["parts"]
    assert list(parts) == ["flex", "packed", "masters", "sampler", "memory"]
    assert parts["flex"]["distance"] < 1e-5
    assert parts["packed"]["float32_distance"] < 1e-5
    assert parts["sampler"]["equal_share"] == 1
    assert parts["masters"]["bfloat16_third_loss"] < parts["masters"]["bfloat16_first_loss"]
    assert "| packed | float32_distance |" in table.read_text()
