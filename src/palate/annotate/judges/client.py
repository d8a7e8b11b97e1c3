"""Requests to an OpenAI-compatible server, and their errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2
import openai

from palate.annotate.judges.pace import retry_after
from palate.model.served.api import DIRECT

LARGEST = 1 << 20
"""Largest reply in bytes; a verdict takes a few thousand."""

RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses of temporary failures. Requests with any other status are not retried."""

EMPTY = frozenset({"insufficient_quota", "billing_hard_limit_reached", "credits_exhausted"})
"""Codes of a 429 for which waiting does not help."""


class TransportError(Exception):
    """A request without a usable reply.

    Attributes:
        status: the HTTP status, if there is one.
        again: a retry may succeed.
        wait: seconds that the server asks to wait first.
        billed: the request may have been billed.
        text: the server's text, for `Dialect.adapt`.
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
        url: the address of the API, such as `http://localhost:8000/v1`.
        key: sent as bearer token; it appears in no message.
        timeout: seconds for a whole request.
        connections: the most connections at once.
    """

    def __init__(self, url: str, key: str, *, timeout: float, connections: int) -> None:
        self._key, self._timeout = key, timeout
        # A small server gives each connection a thread for as long as it is open, so idle ones would keep
        # others waiting. Without TLS a new connection costs nothing.
        idle = connections if url.lower().startswith("https:") else 0
        http = httpx2.AsyncClient(
            timeout=timeout,
            follow_redirects=False,  # a redirect would carry the key elsewhere
            mounts=DIRECT,
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=idle),
            event_hooks={"response": [_bound]},
            headers={"accept-encoding": "identity"},  # a small compressed reply may be a huge one
        )
        # Without these the client would send an OpenAI account from the environment to another company.
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
        """Return the raw reply to a request.

        Raises:
            TransportError: the request failed, or its reply is not usable.
        """
        create: Any = self._client.chat.completions.with_raw_response.create
        try:
            async with asyncio.timeout(self._timeout):  # a slow stream of bytes never times out by itself
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
            if isinstance(cause, Unwanted):  # a retry would get the same reply
                raise TransportError(str(cause), billed=True) from None
            note = self.hide(f"the connection failed ({type(cause).__name__}: {str(cause)[:200]})")
            raise TransportError(note, again=True, billed=not never_sent) from None

    def hide(self, text: str) -> str:
        """Return the text without the key, which a server may repeat."""
        return text.replace(self._key, "[key]") if len(self._key) >= 4 else text

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _refused(self, error: openai.APIStatusError) -> TransportError:
        status, said = error.status_code, self.hide(" ".join(error.response.text.split()))
        if 300 <= status < 400:
            return TransportError(
                f"HTTP {status}: the server redirects elsewhere, and redirects are not followed",
                status=status,
            )
        again = status in RETRIED and error.code not in EMPTY
        wait = retry_after(error.response.headers)
        return TransportError(
            f"HTTP {status}: {said[:200]}", status=status, again=again, wait=wait, text=said
        )


class Unwanted(httpx2.RemoteProtocolError):
    """A reply that is rejected before its end."""


class _Bounded(httpx2.AsyncByteStream):
    """A reply that raises an error when it becomes too long."""

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
        raise Unwanted("the reply is compressed, but the request did not accept compression")
    assert isinstance(response.stream, httpx2.AsyncByteStream)
    response.stream = _Bounded(response.stream)
