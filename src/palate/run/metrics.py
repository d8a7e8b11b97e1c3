"""The rows of metrics of a run: in its journal, in `metrics.jsonl` and in trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from palate.config import RunConfig
from palate.journal import Journal
from palate.run.exports import finite
from palate.run.trackers import Trackers
from palate.run.watch import DeadSteps
from palate.rundir.writing import writing

Number = float | int
Metrics = Mapping[str, Number]


class MetricsLog:
    """Writes rows of metrics.

    The rows in the journal are for the run itself: a resumed run removes those after its last checkpoint.
    `metrics.jsonl` has the same rows for people and other programs.

    Args:
        directory: the run's directory.
        journal: the run's journal.
        cfg: the run's configuration, with the names of the trackers, which receive it.

    Attributes:
        count: number of rows written, over all starts of the run.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, directory: Path, journal: Journal, cfg: RunConfig) -> None:
        self.count = 0
        self._journal = journal
        self._path = directory / "metrics.jsonl"
        self._tokens = 0
        self._last_step: Metrics | None = None
        self._most_dead = cfg.max_dead_steps
        self._dead = DeadSteps(cfg.max_dead_steps, [])
        with ExitStack() as undo:
            with writing(self._path):
                self._file = self._path.open("a", encoding="utf-8")
            undo.callback(self._file.close)
            self._trackers = Trackers(
                cfg.report_to,
                directory / "trackers",
                cfg.model_dump(mode="json"),
                id=journal.fact("run") or "",
                name=self._tracked_as(directory),
            )
            undo.pop_all()

    def _tracked_as(self, directory: Path) -> str:
        """Return the name of the run in trackers, which stays the same when the directory moves."""
        name = self._journal.fact("name in trackers")
        if name is None:
            name = directory.resolve().name
            self._journal.keep_fact("name in trackers", name)
        return name

    def restore(self) -> None:
        """Rewrite `metrics.jsonl` from the journal, which a resumed run has rewound."""
        with writing(self._path):
            lines = [json.dumps(row) + "\n" for row in self._journal.metrics()]
            self._path.write_text("".join(lines), encoding="utf-8")

    def begin(self) -> None:
        """Start the trackers, and continue all counts, from the rows in the journal."""
        rows = self._journal.metrics()
        self.count = len(rows)
        self._dead = DeadSteps(self._most_dead, rows)
        self._tokens = max((int(row.get("num_tokens") or 0) for row in rows), default=0)
        self._trackers.start(after=max((int(row["step"]) for row in rows), default=0))

    def sum_tokens(self, row: Metrics) -> dict[str, Number]:
        """Return a step's row with `num_tokens` summed over the run, as in TRL."""
        if "num_tokens" not in row:
            return dict(row)
        self._tokens += int(row["num_tokens"])
        return {**row, "num_tokens": self._tokens}

    def write(self, row: Metrics, *, key: str | None = None) -> None:
        """Add a row.

        Args:
            row: numbers by name, including `step`.
            key: key of a measurement, to find its row in the journal.

        Raises:
            RunError: the row cannot be written.
        """
        numbers = finite(row)
        if "step_time" in row:
            self._last_step = row
        self._journal.add_metrics(numbers, key=key)
        self.count += 1
        with writing(self._path):
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        self._trackers.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    @property
    def last_step(self) -> Metrics | None:
        """The row of the last step, including steps before an interruption; None before the first step."""
        if self._last_step is None:
            steps = [row for row in self._journal.metrics() if "step_time" in row]
            self._last_step = steps[-1] if steps else None
        return self._last_step

    def require_pairs(self, row: Metrics) -> None:
        """Raise RunError if too many steps in a row had no pair to learn from."""
        self._dead.see(row)

    def close(self) -> None:
        """Close the file and the trackers."""
        with ExitStack() as closing:  # a failure in one does not prevent the other
            closing.callback(self._file.close)
            closing.callback(self._trackers.close)


def without_step(row: Metrics) -> Metrics:
    """Return the numbers of a row without its step."""
    return {name: value for name, value in row.items() if name != "step"}
