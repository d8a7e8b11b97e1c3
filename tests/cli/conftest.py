from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from palate.testing import tiny_policy

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, tiny: str, describe: MakeRun) -> MakeRun:
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
