"""The status of a run while it works, as `status.json`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.errors import RunError
from palate.run.clock import Clock
from palate.run.directory import now_text
from palate.run.ending import ended
from palate.run.status import write_status
from palate.rundir import Status, read_status
from palate.rundir.writing import writing


class Progress:
    """The state and the steps of a run.

    Args:
        directory: the run's directory.
        clock: measures the run's time.
        kept: False in a process without the run's files.

    Attributes:
        status: the current status.
    """

    def __init__(self, directory: Path, clock: Clock, *, kept: bool = True) -> None:
        self.status = Status("running")
        self._directory, self._clock, self._kept = directory, clock, kept

    def set(self, **changes: Any) -> None:
        """Change fields of the status; the next `write` stores them."""
        self.status = replace(self.status, **changes)

    def write(self) -> None:
        """Write the status.

        Raises:
            RunError: the file cannot be written.
        """
        if not self._kept:
            return
        self.set(seconds=round(self._clock.seconds, 1), updated=now_text())
        with writing(self._directory / "status.json"):
            write_status(self._directory, self.status)

    def restore(self) -> None:
        """Continue from the status of the run's last start."""
        with suppress(RunError):  # a run that was killed early has no status
            self.status = replace(read_status(self._directory), state="running", reason="")
        self._clock.before = self.status.seconds

    def end(self, error: BaseException | None) -> None:
        """Write the final status.

        Raises:
            RunError: the file cannot be written.
        """
        self.status = ended(self.status, error)
        self.write()
