"""A judge behind an OpenAI-compatible server: vLLM, llama.cpp, or a hosted model."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from palate import eventloop
from palate.annotate.judges.client import Client, TransportError
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.pace import Pace
from palate.annotate.judges.prices import Price
from palate.annotate.judges.reading import MASS, NO_LOGPROBS
from palate.annotate.judges.records import Question, Verdict
from palate.annotate.judges.talk import Talk
from palate.errors import ConfigError

FATAL = frozenset({401, 402, 403, 404})
"""Statuses after which further requests would fail in the same way."""

NO_KEY = "none"
"""The placeholder that is sent to a server without keys."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of the requests to a server.

    Attributes:
        longest: the most characters shown of each text.
        max_tokens: the most tokens for a verdict in text.
        temperature: the temperature of a verdict in text.
        mass: the lowest total probability of the labels for a usable verdict.
        logprobs: read label probabilities if the server gives them.
        at_once, requests_per_minute, tokens_per_minute: the rate limits; see `Pace`.
        timeout: seconds for a request.
        retries: retries after the first attempt.
        backoff: seconds before the first retry, unless the server asks for another wait; doubled each time.
        max_wait: the longest wait in seconds that a server may ask for; a longer one fails at once.
    """

    longest: int = 8000
    max_tokens: int = 16
    temperature: float = 1.0
    mass: float = MASS
    logprobs: bool = True
    at_once: int = 16
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 0.5
    max_wait: float = 300.0


@dataclass(frozen=True)
class Dialect:
    """The parameters that a server accepts: some servers refuse parameters that others need."""

    limit: str = "max_tokens"
    tops: int = 20
    temperature: bool = True

    def adapt(self, complaint: str) -> Dialect | None:
        """Return the dialect without the parameter that a complaint is about; None if it is about another."""
        if "max_completion_tokens" in complaint and self.limit == "max_tokens":
            return replace(self, limit="max_completion_tokens")
        if "logprobs" in complaint and self.tops:
            return replace(self, tops=5 if self.tops > 5 and "top_logprobs" in complaint else 0)
        if "temperature" in complaint and self.temperature:
            return replace(self, temperature=False)
        return None


class ServerModel:
    """Asks a server, with one request per question and order.

    Attributes:
        options, price: as given.
        remote: True, because it computes elsewhere, so that this process can do other work meanwhile.
        client, pace: send requests and limit their rate.
        dialect: the parameters that the server has accepted so far.

    Args:
        model: the model's name on the server.
        url: the address of its API.
        key: sent to the server; never saved.
        price: the price of its tokens.
        options: the options of the requests.
    """

    remote = True

    def __init__(self, model: str, url: str, *, key: str, price: Price, options: ServerOptions) -> None:
        self.name = f"server:{model}@{url}"
        own = {"longest": options.longest, "max_tokens": options.max_tokens, "mass": options.mass}
        own |= {"temperature": options.temperature} if options.temperature != 1.0 else {}
        self.identity: Mapping[str, Any] = {"model": model, "url": url, **own}
        self._model, self.price, self.options = model, price, options
        self.client = Client(url, key, timeout=options.timeout, connections=options.at_once)
        self.pace = Pace(options.at_once, options.requests_per_minute, options.tokens_per_minute)
        self.dialect = Dialect()
        self._gives_logprobs: bool | None = None if options.logprobs else False
        self._without = 0
        self._served: set[str] = set()
        self._exposed = key != NO_KEY and unprotected(url)

    def ask(self, questions: Mapping[str, Question], desk: Desk) -> None:
        """Answer questions; see `JudgeModel.ask`."""
        if self._exposed:
            self._exposed = False
            desk.say(
                f"judge {self.name}: the key and all texts are sent without encryption (http) to another "
                "machine; use https if the server offers it"
            )
        eventloop.run(self._ask_all(questions, desk))

    def close(self) -> None:
        """Close the connections."""
        eventloop.run(self.client.close())

    async def _ask_all(self, questions: Mapping[str, Question], desk: Desk) -> None:
        waiting = iter(questions.items())
        while self._gives_logprobs is None and (next_one := next(waiting, None)) is not None:
            # One request is sent first, to detect a wrong key or a server without log-probabilities.
            key, question = next_one
            if await self._ask_one(key, question, desk) in FATAL:
                return
        workers = [self._work(waiting, desk) for _ in range(min(self.options.at_once, len(questions)))]
        for outcome in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _work(self, waiting: Iterator[tuple[str, Question]], desk: Desk) -> None:
        for key, question in waiting:  # shared: each worker takes the next question
            if not question.wants_logprobs or self._gives_logprobs is not False:
                await self._ask_one(key, question, desk)

    async def _ask_one(self, key: str, question: Question, desk: Desk) -> int | None:
        """Ask one question and save its verdict; return the HTTP status if it failed."""
        talk = Talk(self, key, question, desk)
        try:
            verdict = await talk.verdict()
        except TransportError as failure:
            verdict = Verdict("failed", note=failure.note, http_status=failure.status)
        verdict = talk.described(verdict)
        if verdict.status == "failed":
            desk.note_failure(key, verdict)
        elif question.wants_logprobs:
            verdict = self._learnt(verdict)
        if talk.request is not None:
            desk.ledger.done(talk.request, talk.last, question, key, self.name, verdict)
        served = verdict.served_model
        if served and served != self._model and served not in self._served:
            self._served.add(served)
            desk.say(f"judge {self.name}: the server answers as {served!r}")
        return verdict.http_status

    def _learnt(self, verdict: Verdict) -> Verdict:
        """Detect a server without log-probabilities, by two replies without and none with them.

        A single reply without them from a server that gives them is a fault and does not switch to sampling.
        """
        if verdict.status in ("ok", "unparsed"):
            self._gives_logprobs = True
        elif verdict.note == NO_LOGPROBS:
            if self._gives_logprobs:
                return replace(verdict, status="unparsed")
            self._without += 1
            self._gives_logprobs = False if self._without == 2 else self._gives_logprobs
        return verdict

    def body(
        self, messages: list[dict[str, str]], limit: int, *, logprobs: bool, temperature: float
    ) -> dict[str, Any]:
        """Return a request in the server's dialect."""
        dialect = self.dialect
        body: dict[str, Any] = {"model": self._model, "messages": messages, dialect.limit: limit}
        if dialect.temperature:
            body["temperature"] = temperature
        if logprobs and dialect.tops:
            body |= {"logprobs": True, "top_logprobs": dialect.tops}
        return body


def address(spec: str) -> tuple[str, str]:
    """Return the model and the URL of `MODEL@URL`.

    Raises:
        ConfigError: the form is wrong, or the URL contains a secret.
    """
    match = re.fullmatch(r"(?P<model>.+?)@(?P<url>https?://.+)", spec, re.IGNORECASE)
    if match is None:
        raise ConfigError(
            f"judge 'server:{spec}' names no server; expected server:MODEL@URL, such as "
            "server:gpt-4o-mini@https://api.openai.com/v1 or server:local@http://localhost:8000/v1"
        )
    url = match["url"].rstrip("/")
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "the judge's URL contains a user, a password or a query; a secret would be written to the run's "
            "files, so put the key into an environment variable and name it with --judge-key-env"
        )
    return match["model"], url


def key_from(name: str, url: str) -> str:
    """Return the key from an environment variable. A server without https may work without one.

    Raises:
        ConfigError: the variable is not set.
    """
    key = os.environ.get(name, "").strip()
    if key:
        return key
    if urlsplit(url).scheme.lower() == "https":
        raise ConfigError(
            f"the judge at {url} needs a key: set the environment variable {name}, or name another with "
            "--judge-key-env"
        )
    return NO_KEY


def unprotected(url: str) -> bool:
    """Return True if requests to `url` leave this machine without encryption."""
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme.lower() == "https" or host == "localhost" or host.endswith(".localhost"):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True  # a name, which may be any machine's
