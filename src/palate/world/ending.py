"""The error with which the processes of a run end: one of them has it, all end with it, one reports it."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from palate.errors import BudgetError, PalateError, ProcessError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes of a process that ends with an error, and of one that is interrupted."""

PATIENCE = 3.0
"""Seconds for which another process leaves the report to process 0."""

_KEY, _SPEAKER = "ending", "speaker"


@dataclass(frozen=True)
class Ending:
    """The end of a process.

    Attributes:
        rank: number of the process.
        sentence: its error.
        interrupted: True for Ctrl-C and the like, after which the run is as good as before.
        own: False if it ended because of another process.
    """

    rank: int
    sentence: str
    interrupted: bool
    own: bool = True

    @staticmethod
    def published(store: Store) -> Ending | None:
        """Return the first ending of a process; None as long as there is none."""
        if not store.check([_KEY]):
            return None
        there: dict[str, Any] = json.loads(store.get(_KEY))
        return Ending(**there)

    def publish(self, store: Store) -> bool:
        """Publish it to the other processes; return True if this process is the one to report the error."""
        if self.rank > 0:
            self._write(store)
            until = time.monotonic() + PATIENCE
            while time.monotonic() < until and not store.check([_SPEAKER]):
                time.sleep(0.05)
        speaker = store.compare_set(_SPEAKER, "", str(self.rank))
        self._write(store)
        return speaker.decode() == str(self.rank)

    def _write(self, store: Store) -> None:
        if self.own:
            store.compare_set(_KEY, "", json.dumps(asdict(self)))


def ending_of(error: BaseException, rank: int) -> Ending:
    """Return the ending of a process that an error leaves."""
    text = (
        str(error)
        if isinstance(error, PalateError | KeyboardInterrupt)
        else f"{type(error).__name__}: {error}"
    )
    interrupted = isinstance(error, KeyboardInterrupt | BudgetError)
    return Ending(rank, text, interrupted, own=not isinstance(error, ProcessError))


def raised(ending: Ending, count: int) -> BaseException:
    """Return the error that the other processes raise."""
    if ending.interrupted:
        return KeyboardInterrupt(ending.sentence)
    return ProcessError(f"process {ending.rank} of {count}: {ending.sentence}")
