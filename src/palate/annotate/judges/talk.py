"""The exchange with a server about one question: its requests, their retries and their costs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import tenacity

from palate.annotate.judges.client import TransportError
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.reading import read
from palate.annotate.judges.records import Amount, Question, Verdict, closing
from palate.annotate.judges.reply import Reply, read_reply
from palate.errors import AnnotatorError

if TYPE_CHECKING:
    from palate.annotate.judges.server import ServerModel

OVERHEAD = 512
"""The most tokens that a server's chat template may put around a message."""


class Talk:
    """The exchange with a server about one question: one request, or two with reasoning.

    Attributes:
        request: the number of the last request in the ledger, which is settled together with the verdict.
        last: the cost of the last request.
    """

    def __init__(self, server: ServerModel, key: str, question: Question, desk: Desk) -> None:
        self._server, self._key, self._question, self._desk = server, key, question, desk
        self._options = server.options
        self._started = time.perf_counter()
        self._attempts = self._tokens_in = self._tokens_out = 0
        self._cost = 0.0
        self._raw: list[str] = []
        self._reply: Reply | None = None
        self.request: int | None = None
        self.last = Amount()

    async def verdict(self) -> Verdict:
        """Return the verdict. Raise `TransportError` without a reply, and `BudgetError` at a limit."""
        question, options = self._question, self._options
        messages = [{"role": "user", "content": question.render(options.longest)}]
        rubric = question.template.mode == "rubric"
        if question.reasoning and not rubric:
            thought = await self._say(messages, question.reasoning, logprobs=False, temperature=0.0)
            if thought.refused or not thought.text.strip():
                return Verdict("refused" if thought.refused else "cut", note="the judge gave no reasoning")
            messages += [
                {"role": "assistant", "content": thought.text},
                {"role": "user", "content": closing(question)},
            ]
        if rubric:
            limit = max(options.max_tokens, question.reasoning)
        else:
            limit = options.max_tokens if question.sampled else 1
        temperature = 1.0 if question.wants_logprobs else options.temperature
        reply = await self._say(messages, limit, logprobs=question.wants_logprobs, temperature=temperature)
        reading = read(question, reply, mass=options.mass)
        return Verdict(
            reading.status,
            reading.probabilities,
            reading.label_mass,
            reading.argmax_is_label,
            note=reading.note,
        )

    def described(self, verdict: Verdict) -> Verdict:
        """Return the verdict with its raw text, tokens and cost."""
        reply, hide = self._reply, self._server.client.hide
        return replace(
            verdict,
            raw=hide("\n\n".join(self._raw))[:20_000],
            note=hide(verdict.note),
            finish="" if reply is None else reply.finish,
            attempts=self._attempts,
            prompt_tokens=self._tokens_in,
            completion_tokens=self._tokens_out,
            cost=self._cost,
            price_source=self._server.price.source,
            served_model="" if reply is None else hide(reply.model)[:200],
            fingerprint="" if reply is None else hide(reply.fingerprint)[:200],
            latency_ms=round(1000 * (time.perf_counter() - self._started)),
            changed=self._question.changed,
            cuts=self._question.cuts(self._options.longest),
        )

    async def _say(
        self, messages: list[dict[str, str]], limit: int, *, logprobs: bool, temperature: float
    ) -> Reply:
        # A token has at least one byte.
        length = sum(len(message["content"].encode()) for message in messages)
        worst = self._server.price.amount(length + OVERHEAD, limit)
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._options.retries + 1),
            retry=tenacity.retry_if_exception(self._may_retry),
            wait=self._wait,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await self._attempt(messages, limit, worst, logprobs=logprobs, temperature=temperature)
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(
        self, messages: list[dict[str, str]], limit: int, worst: Amount, *, logprobs: bool, temperature: float
    ) -> Reply:
        desk, server = self._desk, self._server
        async with server.pace.slot(
            worst.tokens // 3
        ):  # a token has about 4 bytes, so this is still a generous estimate
            await self._settle_last()
            await desk.budget.reserve(worst, new=not desk.ledger.was_sent(self._key))
            self.request, self.last = desk.ledger.sent(self._key, worst), worst
            self._attempts += 1
            try:
                reply = await self._post(messages, limit, logprobs=logprobs, temperature=temperature)
                usage = reply.usage
                if usage is not None:
                    self.last = server.price.amount(usage.prompt_tokens, usage.completion_tokens)
                    self._tokens_in += usage.prompt_tokens
                    self._tokens_out += usage.completion_tokens
            except TransportError as failure:
                if not failure.billed:
                    self.last = Amount()
                if failure.wait is not None and failure.again:
                    if failure.wait <= self._options.max_wait:
                        server.pace.hold(failure.wait)
                    else:
                        failure.note += (
                            f"; it asks to wait {failure.wait:,.0f} seconds, more than --judge-max-wait "
                            f"{self._options.max_wait:g}"
                        )
                raise
            finally:  # also when cancelled: then the worst case counts as spent
                await desk.budget.settle(worst, self.last)
                self._cost += self.last.cost
        self._reply = reply
        self._raw.append(reply.text)
        return reply

    async def _post(
        self, messages: list[dict[str, str]], limit: int, *, logprobs: bool, temperature: float
    ) -> Reply:
        server = self._server
        while True:
            dialect = server.dialect
            body = server.body(messages, limit, logprobs=logprobs, temperature=temperature)
            try:
                content = await server.client.post(body)
                break
            except TransportError as failure:
                if failure.status not in (400, 422):
                    raise
                if server.dialect == dialect:  # otherwise another request has adapted it in the meantime
                    adapted = dialect.adapt(failure.text)
                    if adapted is None:
                        raise
                    server.dialect = adapted
        try:
            return read_reply(content)
        except AnnotatorError as error:
            raise TransportError(server.client.hide(str(error)), status=200, billed=True) from None

    async def _settle_last(self) -> None:
        """Settle an earlier attempt, or the reasoning, which has no verdict of its own."""
        if self.request is not None:
            self._desk.ledger.settle(self.request, self.last)

    def _may_retry(self, error: BaseException) -> bool:
        return (
            isinstance(error, TransportError)
            and error.again
            and (error.wait or 0.0) <= self._options.max_wait
        )

    def _wait(self, state: tenacity.RetryCallState) -> float:
        """Return the wait that the server asks for; else the backoff, doubled each time and partly random."""
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, TransportError) and error.wait is not None:
            return error.wait
        first = self._options.backoff
        return float(tenacity.wait_exponential_jitter(multiplier=first, max=60 * first, jitter=first)(state))
