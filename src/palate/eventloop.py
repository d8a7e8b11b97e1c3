"""One event loop for all asynchronous work: a client can only be used in the loop that created it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

GRACE = 5.0
"""Seconds that a cancelled task has to clean up."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine in the process's one event loop and wait for it.

    The loop has its own thread, so this also works in a notebook, which already runs a loop. Ctrl-C
    cancels the coroutine.
    """
    ended = threading.Event()

    async def watched() -> T:
        try:
            return await work
        finally:
            ended.set()

    future = begin(watched())
    try:
        return future.result()
    except KeyboardInterrupt:
        future.cancel()
        ended.wait(GRACE)
        raise


def begin(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Start a coroutine in the process's one event loop; the future waits for it or cancels it."""
    return asyncio.run_coroutine_threadsafe(work, _running())


def _running() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="palate-loop", daemon=True).start()
        return _loop


def _forget() -> None:
    """Drop the loop in a forked process, which does not have the loop's thread."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)
