from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for `write_report`: what it was given, or first of all what it shall raise."""
    calls: list[Any] = []

    def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append((list(runs), output))
        return output or runs[0] / "report.html"

    monkeypatch.setitem(sys.modules, "palate.report", SimpleNamespace(write_report=write_report))  # type: ignore[arg-type]
    return calls
