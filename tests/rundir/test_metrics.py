from __future__ import annotations

import json
from pathlib import Path

from palate.rundir import latest_numbers
from palate.rundir.metrics import TAIL


def test_the_latest_value_of_each_metric(tmp_path: Path) -> None:
    assert latest_numbers(tmp_path) == {}
    rows = [{"step": 1, "loss": 2.0, "early": 1}, {"step": 2, "loss": 1.0}, [1], {"step": 2, "eval": 0.5}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines + '{"step": 3, "lo')
    assert latest_numbers(tmp_path) == {"step": 2, "loss": 1.0, "early": 1, "eval": 0.5}
    # Of a long file the end is read: what stands before it is not known.
    filler = json.dumps({"step": 2, "x": "y" * TAIL}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(lines + filler + '{"step": 9}\n')
    assert latest_numbers(tmp_path) == {"step": 9}
