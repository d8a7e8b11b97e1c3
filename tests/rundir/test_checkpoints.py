from __future__ import annotations

from pathlib import Path

import pytest

from palate.errors import RunError
from palate.rundir import checkpoint


def test_checkpoints_by_number(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no finished checkpoint yet"):
        checkpoint(tmp_path)
    for name in ("step-9", "step-10", ".step-11.5", "step-12.part", "steps-13", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint(tmp_path).name == "step-10"
    assert checkpoint(tmp_path, 9).name == "step-9"
    with pytest.raises(RunError, match=r"has no checkpoint of step 11; it has steps 9, 10$"):
        checkpoint(tmp_path, 11)
