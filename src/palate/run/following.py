"""The parts of a run in the processes other than 0, which have no files: they keep and say nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palate.config import RunConfig
from palate.journal import Journal
from palate.run.checkpoint import Checkpoint
from palate.run.directory import RunDirectory
from palate.run.metrics import Metrics, MetricsLog
from palate.world import current


@dataclass(frozen=True)
class FollowedDirectory:
    """The directory of a run that process 0 owns.

    Attributes:
        path, id, resumed, changes: as in `RunDirectory`.
    """

    path: Path
    id: str
    resumed: bool
    changes: list[str]

    def journal(self, latest: Checkpoint | None, say: Callable[[str], None]) -> Journal:
        """Return an empty journal in memory; `SharedMemory` reads that of process 0."""
        return Journal(":memory:")

    def settle(self) -> None:
        """Write nothing."""

    def add(self, name: str, value: Any) -> None:
        """Write nothing."""

    def keep(self) -> None:
        """Delete nothing."""

    def release(self, *, refused: bool = False) -> None:
        """Unlock nothing."""


Place = RunDirectory | FollowedDirectory


def open_directory(path: Path, method: str, cfg: RunConfig) -> Place:
    """Return the run's directory in process 0, and its facts in the others; see `RunDirectory`."""
    opened: list[RunDirectory] = []

    def opening() -> list[Any]:
        opened.append(RunDirectory(path, method, cfg))
        return [opened[0].id, opened[0].resumed, opened[0].changes]

    facts = current().lead("the run's directory", opening)
    return opened[0] if opened else FollowedDirectory(path, *facts)


class FollowedMetrics:
    """The metrics of a run that process 0 writes; see `MetricsLog`."""

    count = 0
    last_step: Metrics | None = None

    def restore(self) -> None:
        """Rewrite nothing."""

    def begin(self) -> None:
        """Count nothing."""

    def sum_tokens(self, row: Metrics) -> dict[str, float]:
        """Return the row as it is."""
        return dict(row)

    def write(self, row: Metrics, *, key: str | None = None) -> None:
        """Write nothing."""

    def require_pairs(self, row: Metrics) -> None:
        """Check nothing; an error of process 0 ends the others too."""

    def close(self) -> None:
        """Close nothing."""


def open_metrics(directory: Path, journal: Journal, cfg: RunConfig) -> MetricsLog | FollowedMetrics:
    """Return the metrics of a run for this process."""
    return MetricsLog(directory, journal, cfg) if current().leads else FollowedMetrics()
