"""Rate limits for requests to a server: requests at once, per minute, and waits that the server asks for."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime

from aiolimiter import AsyncLimiter


class Pace:
    """Limits the rate of requests.

    Args:
        at_once: the most requests in flight.
        requests: the most requests per minute; None for no limit.
        tokens: the most estimated tokens per minute; None for no limit.
    """

    def __init__(self, at_once: int, requests: int | None = None, tokens: int | None = None) -> None:
        self._at_once = asyncio.Semaphore(at_once)
        # Small buckets: a bucket for a whole minute would allow twice the rate in the first minute.
        self._requests = (
            None if requests is None else AsyncLimiter(max(1.0, requests / 60), _period(requests))
        )
        self._tokens = None if tokens is None else AsyncLimiter(tokens / 6, 10)
        self._most_tokens = (tokens or 0) / 6
        self._open_at = 0.0

    @asynccontextmanager
    async def slot(self, tokens: int) -> AsyncIterator[None]:
        """Wait until a request of at most `tokens` tokens may be sent, and hold its slot until it is done."""
        async with self._at_once:
            while (wait := self._open_at - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait)
            if self._requests is not None:
                await self._requests.acquire()
            if self._tokens is not None:
                await self._tokens.acquire(min(tokens, self._most_tokens))
            yield

    def hold(self, seconds: float) -> None:
        """Send nothing for some seconds, because the server asked to wait."""
        self._open_at = max(self._open_at, asyncio.get_running_loop().time() + seconds)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a server asks to wait: `retry-after-ms`, or `retry-after` as seconds or a date.

    Return None if the headers have no such entry, or no sensible time in it.
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
