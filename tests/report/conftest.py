from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from palate.report.read import RunRecord, Sample
from palate.run.status import Status

FINISHED = Status("finished", 4, 4, "", 61.0, "2026-11-21T14:07:02+0000")


def by_step(metrics: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """A row a step, counted from 1, of metrics that are given as one list each."""
    count = max((len(values) for values in metrics.values()), default=0)
    named = ({name: values[i] for name, values in metrics.items() if i < len(values)} for i in range(count))
    return [{"step": i + 1, **row} for i, row in enumerate(named)]


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    """A record made by hand: `metrics` are lists with one value a step, `measured` with one a measurement."""

    def make(
        metrics: Mapping[str, Sequence[float]] | None = None,
        measured: Mapping[str, Sequence[float]] | None = None,
        *,
        summary: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        resolved: Mapping[str, Any] | None = None,
        samples: Sequence[Sample] = (),
        status: Status = FINISHED,
        method: str = "oaif",
        directory: Path = Path("runs/a"),
    ) -> RunRecord:
        measurements = [{**row, "step": row["step"] - 1} for row in by_step(measured or {})]
        return RunRecord(
            directory=directory,
            method=method,
            description={"method": method, "config": config or {}, "resolved": resolved or {}},
            status=status,
            rows=tuple(by_step(metrics or {})),
            measurements=tuple(measurements),
            summary=summary or {},
            samples=tuple(samples),
        )

    return make


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's directory as a run leaves it; NaN becomes null."""

    def write(
        name: str = "a",
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        samples: Sequence[Mapping[str, Any]] = (),
        summary: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        status: Status = FINISHED,
        method: str = "oaif",
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        description = {
            "method": method,
            "config": {"model": "smollm2", "data": "everyday", **(config or {})},
            "resolved": {"device": "cpu", "dtype": "float32"},
            "versions": {"palate": "0.1.0"},
            "python": "3.12.1",
            "machine": {"system": "Linux", "threads": 2},
            "started": "2026-11-21T14:02:11+0000",
        }
        (directory / "config.json").write_text(json.dumps(description))
        (directory / "status.json").write_text(json.dumps(asdict(status)))
        lines = [json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows]
        (directory / "metrics.jsonl").write_text("".join(lines))
        if summary is None and samples:
            summary = {}  # it is written after them
        if summary is not None:
            (directory / "summary.json").write_text(json.dumps({"method": method, "steps": 4, **summary}))
        if samples:
            (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        return directory

    return write


@pytest.fixture
def online_rows() -> list[dict[str, float]]:
    """Eight steps of an online method, one of them without a finite gradient norm."""
    return [
        {
            "step": i,
            "loss": 0.7 - 0.02 * i,
            "grad_norm": math.nan if i == 3 else 1.0 + 0.1 * i,
            "objective/scores": 0.1 * i,
            "objective/scores_std": 0.2,
            "objective/kl": 0.1 * i,
            "rewards/accuracies": 0.5 + 0.02 * i,
            "completions/clipped_ratio": 0.1,
            "pairs/kept": 15,
            "pairs/dropped": 1,
            "pairs/dropped_tie": 1,
            "pairs/dropped_identical": 0,
            "pairs/dropped_unusable": 0,
            "time/sample": 2.0,
            "time/learn": 1.0,
            "step_time": 3.5,
        }
        for i in range(1, 9)
    ]
