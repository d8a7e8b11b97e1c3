from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palate.errors import RunError
from palate.rundir import holds_run, read_description


def test_a_run_is_told_from_a_model(describe: Callable[..., Path], tmp_path: Path) -> None:
    run = describe(tmp_path / "run", model="m")
    assert read_description(run)["config"] == {"model": "m"}
    assert holds_run(run)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    assert not holds_run(tmp_path / "model")
    assert not holds_run(tmp_path)
    (tmp_path / "model/status.json").write_text("{}")
    assert holds_run(tmp_path / "model")


@pytest.mark.parametrize("text", ["", "{", "[1", "\xff", "[" * 100_000])
def test_a_broken_run_is_held_for_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert holds_run(tmp_path)
    with pytest.raises(RunError, match=r"config\.json' cannot be read: "):
        read_description(tmp_path)


def test_what_is_no_run(describe: Callable[..., Path], tmp_path: Path) -> None:
    describe(tmp_path / "run", model="m")
    (tmp_path / "run/checkpoints/step-4").mkdir(parents=True)
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    for name, message in {
        "none": "'.*none' does not exist; expected the directory of a run",
        "run/config.json": "'.*config.json' is a file; expected the directory of a run",
        "list": "'.*list' is not a run",
        "run/checkpoints": "'.*checkpoints' is not a run",
        "run/checkpoints/step-4": "step-4' is a checkpoint; give the run's directory, '.*run' .* --step",
        "x\0y": "does not exist",
    }.items():
        with pytest.raises(RunError, match=message):
            read_description(tmp_path / name)
