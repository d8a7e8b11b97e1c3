"""Requests to a vLLM server: bounded, retried, and with one clear sentence when the server is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx2
import tenacity

from palate.errors import AGAIN, RunError

LARGEST = 64 << 20
"""Largest reply in bytes: a token takes about 100."""

RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses of failures that may be temporary."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before the first retry, doubled each time; at most."""

START = "start it with --enable-scale-out --generation-config vllm"
"""The options of every server that Palate can use, as advice."""

DIRECT = {f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")}
"""Hosts of this machine, for an HTTP client: a proxy that the environment names cannot reach them, and would
get the key."""


class RefusedError(Exception):
    """A reply with an error.

    Attributes:
        status: the HTTP status.
        text: the server's words, shortened.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"HTTP {status}: {text}")
        self.status, self.text = status, text


class API:
    """The API of one vLLM server.

    Args:
        url: address of the server, without a path.
        key: sent as bearer token if it is not empty; it appears in no message.
        timeout: seconds for a whole request.
        retries: number of retries after the first attempt.
        ended: returns the reason why a server that this run has started has ended; None while it runs.
        kept: the work that an interruption does not lose, for messages.
        advice: the options that the server needs, for messages.
    """

    def __init__(
        self, url: str, *, key: str, timeout: float, retries: int,
        ended: Callable[[], str | None] = lambda: None, kept: str = "finished samples are in the journal",
        advice: str = START,
    ) -> None:  # fmt: skip
        self.url, self._key, self._timeout, self._retries = url, key, timeout, retries
        self.advice = advice
        self._ended, self._kept = ended, kept
        self._client = httpx2.AsyncClient(
            timeout=timeout,
            follow_redirects=False,  # a redirect would carry the key elsewhere
            mounts=DIRECT,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {key}"} if key else {}),
        )

    async def get(self, path: str) -> Any:
        """Return the JSON of a resource; see `post` for the errors."""
        return await self._send("GET", path, None, self._retries)

    async def post(self, path: str, body: Mapping[str, Any], *, retries: int | None = None) -> Any:
        """Return the JSON of the reply to a request; None for a plain text.

        Args:
            path, body: the request.
            retries: number of retries after the first attempt; None for the usual number.

        Raises:
            RefusedError: the server refused the request for good.
            RunError: the server does not answer, also after all retries.
        """
        return await self._send("POST", path, body, self._retries if retries is None else retries)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None, retries: int) -> Any:
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(retries + 1),
            retry=tenacity.retry_if_exception(self._may_help),
            wait=tenacity.wait_exponential_jitter(multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    return await self._once(method, path, body)
        except TimeoutError as error:
            longer = (
                ", give it more time with --rollout-timeout or fewer requests at once with --sampling-rows"
            )
            note = f"no reply within {self._timeout:g} seconds"
            raise self._gone(note, retries, advice=longer) from error
        except httpx2.TransportError as error:
            raise self._gone(f"{type(error).__name__}: {str(error)[:200]}", retries) from error
        except RefusedError as error:
            if error.status in RETRIED:
                raise self._gone(str(error), retries, "fails") from error
            raise
        raise AssertionError("the last attempt returns or raises")

    async def _once(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        async with asyncio.timeout(self._timeout):  # a slow stream of bytes never times out by itself
            request = self._client.build_request(method, self.url + path, json=body)
            reply = await self._client.send(request, stream=True)
            try:
                content = bytearray()
                async for part in reply.aiter_raw():
                    content += part
                    if len(content) > LARGEST:
                        raise RefusedError(reply.status_code, f"the reply is longer than {LARGEST} bytes")
            finally:
                await reply.aclose()
        if reply.status_code != 200:
            raise RefusedError(reply.status_code, self._hide(_words(bytes(content)))[:300])
        try:
            return json.loads(content)
        except ValueError:
            return None

    def _may_help(self, error: BaseException) -> bool:
        if self._ended() is not None:
            return False
        if isinstance(error, RefusedError):
            return error.status in RETRIED
        return isinstance(error, TimeoutError | httpx2.TransportError)

    def _gone(self, note: str, retries: int, what: str = "does not answer", advice: str = "") -> RunError:
        reason = self._ended()
        if reason is not None:
            return RunError(f"{reason}; {self._kept}, so {AGAIN}")
        return RunError(
            f"the vLLM server at {self.url} {what} ({self._hide(note)}; "
            f"{retries + 1} attempts); {self._kept}: start the server again{advice}, then {AGAIN}"
        )

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= 4 else text


def _words(content: bytes) -> str:
    """Return the message in an error's JSON, or its text."""
    text = " ".join(content.decode("utf-8", "replace").split())
    try:
        said = json.loads(text)
    except ValueError:
        return text
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
