"""How fast a server is asked: at once, per minute, and not while it asks to wait."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

from aiolimiter import AsyncLimiter


class Pace:
    """Lets requests through one by one.

    Args:
        at_once: requests in flight.
        requests: per minute; None for no limit.
        tokens: per minute, by estimate; None for no limit.
    """

    def __init__(self, at_once: int, requests: int | None = None, tokens: int | None = None) -> None:
        self._at_once = asyncio.Semaphore(at_once)
        # Small buckets: a minute's worth at once would make twice the rate in the first minute.
        self._requests = (
            None if requests is None else AsyncLimiter(max(1.0, requests / 60), _period(requests))
        )
        self._tokens = None if tokens is None else AsyncLimiter(tokens / 6, 10)
        self._most_tokens = (tokens or 0) / 6
        self._open_at = 0.0

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[None]:
        """Wait until a request that may take so many tokens can go, and keep its place until it is done."""
        async with self._at_once:
            while (wait := self._open_at - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait)
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                await self._tokens.acquire(min(tokens, self._most_tokens))
            yield

    def hold(self, seconds: float) -> None:
        """Send nothing for a while: the server has asked to wait."""
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: `retry-after-ms`, or `retry-after` as seconds or a date.

    None where it does not ask, or where what it asks is not a sensible time.
    """
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers[name]) / scale
        except (KeyError, ValueError):
            continue
        return seconds if math.isfinite(seconds) and seconds >= 0 else None
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    except (KeyError, ValueError, TypeError, OverflowError):
        return None


def _period(requests: int) -> float:
    return max(1.0, 60 / requests)
