from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from palate.cli.directories import TAIL, checkpoint, description, holds_run, latest_numbers
from palate.errors import RunError


def test_a_run_is_told_from_a_model(describe: Callable[..., Path], tmp_path: Path) -> None:
    run = describe(tmp_path / "run", model="m")
    assert description(run)["config"] == {"model": "m"}
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
        description(tmp_path)


def test_what_is_no_run(describe: Callable[..., Path], tmp_path: Path) -> None:
    describe(tmp_path / "run", model="m")
    (tmp_path / "run/checkpoints/step-4").mkdir(parents=True)
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    for name, message in {
        "none": "'.*none' is not there; expected the directory of a run",
        "run/config.json": "'.*config.json' is a file; expected the directory of a run",
        "list": "'.*list' holds no run",
        "run/checkpoints": "'.*checkpoints' holds no run",
        "run/checkpoints/step-4": "step-4' is a checkpoint; give its run, '.*run', and pick with --step",
        "x\0y": "is not there",
    }.items():
        with pytest.raises(RunError, match=message):
            description(tmp_path / name)


def test_checkpoints_by_number(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="has no checkpoint yet"):
        checkpoint(tmp_path)
    for name in ("step-9", "step-10", ".step-11.5", "step-12.part", "steps-13", "step-"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert checkpoint(tmp_path).name == "step-10"
    assert checkpoint(tmp_path, 9).name == "step-9"
    with pytest.raises(RunError, match=r"has no checkpoint of step 11; it has 9, 10$"):
        checkpoint(tmp_path, 11)


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
