"""The rows of metrics of a run: in its journal, in `metrics.jsonl`, and with trackers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from palate.config import RunConfig
from palate.journal import Journal
from palate.run.exports import finite
from palate.run.files import writing
from palate.run.trackers import Trackers
from palate.run.watch import DeadSteps

Number = float | int
Metrics = Mapping[str, Number]


class MetricsLog:
    """Writes rows of metrics as they come.

    The journal has them for the run itself, which is taken back to its last checkpoint when it resumes;
    `metrics.jsonl` has the same rows for people and other programs.

    Args:
        directory: of the run.
        journal: of the run.
        cfg: the run's configuration: names of trackers, and what they are told of the run.

    Attributes:
        count: rows that were written, over all starts of the run.

    Raises:
        RunError: the file cannot be written.
    """

    def __init__(self, directory: Path, journal: Journal, cfg: RunConfig) -> None:
        self.count = 0
        self._journal = journal
        self._path = directory / "metrics.jsonl"
        self._tokens = 0
        self._most_dead = cfg.max_dead_steps
        self._dead = DeadSteps(cfg.max_dead_steps, [])
        with ExitStack() as undo:
            with writing(self._path):
                self._file = self._path.open("a", encoding="utf-8")
            undo.callback(self._file.close)
            self._trackers = Trackers(cfg.report_to, directory / "trackers", cfg.model_dump(mode="json"))
            undo.pop_all()

    def restore(self) -> None:
        """Write `metrics.jsonl` anew from the journal, which a run that resumes has taken back."""
        with writing(self._path):
            lines = [json.dumps(row) + "\n" for row in self._journal.metrics()]
            self._path.write_text("".join(lines), encoding="utf-8")

    def begin(self) -> None:
        """Continue the counts of rows, tokens and dead steps from the rows in the journal."""
        rows = self._journal.metrics()
        self.count = len(rows)
        self._dead = DeadSteps(self._most_dead, rows)
        self._tokens = max((int(row.get("num_tokens") or 0) for row in rows), default=0)

    def sum_tokens(self, row: Metrics) -> dict[str, Number]:
        """The row of a step with `num_tokens` summed up over the run, as TRL has it."""
        if "num_tokens" not in row:
            return dict(row)
        self._tokens += int(row["num_tokens"])
        return {**row, "num_tokens": self._tokens}

    def write(self, row: Metrics, *, key: str | None = None) -> None:
        """Add a row.

        Args:
            row: its numbers by name, `step` among them.
            key: of a measurement, for the journal to find it by.

        Raises:
            RunError: it cannot be written.
        """
        numbers = finite(row)
        self._journal.add_metrics(numbers, key=key)
        self.count += 1
        with writing(self._path):
            self._file.write(json.dumps(numbers) + "\n")
            self._file.flush()
        self._trackers.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def require_pairs(self, row: Metrics) -> None:
        """Raise RunError if this is one step too many in a row without a pair to learn from."""
        self._dead.see(row)

    def close(self) -> None:
        """Close file and trackers; what was written stays."""
        with ExitStack() as closing:  # each of them, even if the other fails
            closing.callback(self._file.close)
            closing.callback(self._trackers.close)
