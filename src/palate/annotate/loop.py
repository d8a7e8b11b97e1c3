"""One event loop for everything asynchronous: a client belongs to the loop that it began in."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 5.0
"""Seconds that what is cancelled has to clean up."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Do something asynchronous and wait for it, in the process's one loop.

    The loop has a thread of its own, so it also works in a notebook, which runs a loop already. Ctrl-C
    cancels the work.
    """
    ended = threading.Event()

    async def watched() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = asyncio.run_coroutine_threadsafe(watched(), _running())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        ended.wait(GRACE)
        raise


def _running() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="palate-loop", daemon=True).start()
        return _loop


def _forget() -> None:
    """A forked process has the loop without its thread."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
