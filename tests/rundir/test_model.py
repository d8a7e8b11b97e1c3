from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from palate.config import ModelConfig
from palate.errors import ModelError
from palate.model import load_model
from palate.rundir import checkpoints_in, model_in
from palate.testing import tiny_policy

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")


def run_in(directory: Path, *steps: str) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"method": "dpo", "config": {}, "versions": {}}))
    for step in steps:
        (directory / "checkpoints" / step).mkdir(parents=True)
    return directory


def test_finished_checkpoints_by_number(tmp_path: Path) -> None:
    assert checkpoints_in(tmp_path) == {}
    run_in(tmp_path, "step-10", "step-9", ".step-11.123", ".step-9.old", "steps-13", "step-")
    assert [*checkpoints_in(tmp_path)] == [9, 10]
    assert model_in(tmp_path) == tmp_path / "checkpoints" / "step-10"


def test_a_model_stands_for_itself(tiny: str, tmp_path: Path) -> None:
    assert model_in(Path(tiny)) == Path(tiny)
    assert model_in(tmp_path) == tmp_path  # nothing is there; loading will say so
    (tmp_path / "config.json").write_text("{")
    assert model_in(tmp_path) == tmp_path


def test_a_run_without_a_finished_checkpoint(tmp_path: Path) -> None:
    run_in(tmp_path, ".step-3.77")  # it is being written
    with pytest.raises(ModelError, match=r"the run '.*' has no finished checkpoint.*; wait until"):
        load_model(ModelConfig(model=str(tmp_path)))


def test_checkpoints_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    run_in(tmp_path, "step-1")
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match=r"checkpoints' cannot be read: Permission denied"):
        model_in(tmp_path)


@pytest.mark.parametrize("lora", [False, True])
def test_the_last_checkpoint_is_loaded(lora: bool, tiny: str, tmp_path: Path) -> None:
    policy = tiny_policy(Path(tiny), model={"lora": lora, "lora_rank": 2})
    run_in(tmp_path)
    for step in (2, 10):
        with torch.no_grad():
            for _, parameter in policy.model.trained():
                parameter += step / 100
        policy.save(tmp_path / "checkpoints" / f"step-{step}")
    cfg = ModelConfig(model=str(tmp_path), dtype="float32", device="cpu", lora=lora, lora_rank=2)
    loaded = load_model(cfg)
    for (name, one), (other_name, other) in zip(policy.model.trained(), loaded.trained(), strict=True):
        assert name == other_name
        assert torch.equal(one, other)
    assert not loaded.fresh_adapter  # so the reference is the policy with its adapter
