"""One request to an OpenAI-compatible server, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import openai

from palate.annotate.judges.pace import retry_after

LARGEST = 1 << 20
"""Bytes of a reply; a verdict takes a few thousand."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses that say "not now". Others stay what they are, however often they are asked for."""

EMPTY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "credits_exhausted"})
"""Codes of a 429 that no waiting mends."""


class TransportError(Exception):
    """A request without a usable reply.

    Attributes:
        status: of HTTP, if there was one.
        again: it may go better the next time.
        wait: seconds that the server asks to wait first.
        billed: nobody knows whether it was billed.
        text: of the server, for `Dialect.adapt`.
    """

    def __init__(
        self, note: str, *, status: int | None = None, again: bool = False, wait: float | None = None,
        billed: bool = False, text: str = "",
    ) -> None:  # fmt: skip
        super().__init__(note)
        self.note, self.status, self.again = note, status, again
        self.wait, self.billed, self.text = wait, billed, text


class Client:
    """Sends chat completions, without retries of its own, redirects or unbounded replies.

    Args:
        url: of the API, such as `http://localhost:8000/v1`.
        key: sent as bearer token; it appears in no message.
        timeout: seconds for a request from beginning to end.
        connections: at once.
    """

    def __init__(self, url: str, key: str, *, timeout: float, connections: int) -> None:
        self._key, self._timeout = key, timeout
        # A small server gives each connection a thread for as long as it is open, so idle ones would keep
        # others waiting. Without TLS a new connection costs nothing.
        idle = connections if url.lower().startswith("https:") else 0
        http = httpx2.AsyncClient(
            timeout=timeout,
            follow_redirects=False,  # a redirect would carry the key elsewhere
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=idle),
            event_hooks={"response": [_bound]},
            headers={"accept-encoding": "identity"},  # a small compressed reply may be a huge one
        )
        # Without these it would send what the environment says of an account at another company.
        headers: dict[str, Any] = {
            "OpenAI-Organization": openai.Omit(),
            "OpenAI-Project": openai.Omit(),
            "Accept-Encoding": "identity",
        }
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=url,
            max_retries=0,  # they would be invisible to the budget
            timeout=timeout,
            http_client=http,
            default_headers=headers,
        )

    async def post(self, body: Mapping[str, Any]) -> bytes:
        """The reply to a request, as it came.

        Raises:
            TransportError: there is none.
        """
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self._timeout):  # a trickle never times out by itself
                response = await create(**body)
                return bytes(response.http_response.content)
        except (TimeoutError, openai.APITimeoutError):
            raise TransportError(
                f"no reply within {self._timeout:g} seconds", again=True, billed=True
            ) from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            never_sent = isinstance(cause, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout)
            if isinstance(cause, Unwanted):  # it was answered, and would be again
                raise TransportError(str(cause), billed=True) from None
            note = self.hide(f"the connection failed ({type(cause).__name__}: {str(cause)[:200]})")
            raise TransportError(note, again=True, billed=not never_sent) from None

    def hide(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return text.replace(self._key, "[key]") if len(self._key) >= 4 else text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _refused(self, error: openai.APIStatusError) -> TransportError:
        status, said = error.status_code, self.hide(" ".join(error.response.text.split()))
        if 300 <= status < 400:
            return TransportError(
                f"HTTP {status}: the server redirects elsewhere, which is not followed", status=status
            )
        again = status in RETRIED and error.code not in EMPTY
        wait = retry_after(error.response.headers)
        return TransportError(
            f"HTTP {status}: {said[:200]}", status=status, again=again, wait=wait, text=said
        )


class Unwanted(httpx2.RemoteProtocolError):
    """A reply that is not read to its end."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply that ends with an error where it grows too long."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > LARGEST:
                raise Unwanted(f"the reply is longer than {LARGEST} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bound(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise Unwanted("the reply is compressed, which was not asked for")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)
