from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.testing import tiny_policy

MakeRun = Callable[..., Path]


@pytest.fixture(name="describe")
def describe_fixture() -> MakeRun:
    """Writes the `config.json` of a run."""
    return describe


def describe(directory: Path, *, method: str = "oaif", started: str | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    found = {"method": method, "config": config, "versions": {}} | ({"started": started} if started else {})
    (directory / "config.json").write_text(json.dumps(found))
    return directory


@pytest.fixture
def make_run(tmp_path: Path, tiny: str) -> MakeRun:
    """Runs with a checkpoint whose weights are far from the base model's."""

    def make(
        name: str = "run", *, model: str = tiny, steps: tuple[int, ...] = (3,), lora: bool = True
    ) -> Path:
        run = describe(tmp_path / name, model=model, dtype="float32", device="cpu", lora=lora)
        policy = tiny_policy(Path(model), model={"lora": lora, "lora_rank": 2})
        for step in steps:
            with torch.no_grad():
                draws = torch.Generator().manual_seed(step)
                for _, parameter in policy.model.trained():
                    parameter += 0.3 * torch.randn(parameter.shape, generator=draws)
            policy.save(run / "checkpoints" / f"step-{step}")
        return run

    return make
