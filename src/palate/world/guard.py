"""The end of a process that waits inside of torch, where it cannot see that the others have ended."""

from __future__ import annotations

import time
from collections.abc import Callable

GRACE = 30.0
"""Seconds from the end of another process until this one, if it has not noticed, is ended."""


class Guard:
    """Says when to end this process.

    A collective of torch on a GPU blocks the main thread, signals included, until its time limit. Another
    thread asks this object again and again.

    Args:
        ended: returns the error of another process that has ended or is silent; None if all live.
    """

    def __init__(self, ended: Callable[[], BaseException | None]) -> None:
        self._ended = ended
        self._since: float | None = None

    def overdue(self) -> BaseException | None:
        """Return the error of another process if it ended more than `GRACE` seconds ago; else None."""
        error = self._ended()
        if error is None:
            self._since = None
            return None
        self._since = self._since or time.monotonic()
        return error if time.monotonic() - self._since > GRACE else None
