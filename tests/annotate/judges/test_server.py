from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest

from palate.annotate.base import in_both_orders, judged
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.pace import Pace, retry_after
from palate.annotate.judges.prices import Price
from palate.annotate.judges.server import ServerModel, ServerOptions, address, key_from, unprotected
from palate.errors import AnnotatorError, ConfigError
from palate.testing import Fault, judge_reply
from palate.types import Completion, Group, Prompt

Open = Callable[..., Any]


def longer(first: str, second: str) -> float:
    return 0.9 if len(first) > len(second) else 0.2


def honest(body: dict[str, Any], number: int) -> dict[str, Any]:
    return judge_reply(body, longer)


def done(text: str) -> Completion:
    return Completion(text, (1,))


def ask(court: Any, *pairs: tuple[str, str], prompt: str = "Q") -> list[float | None]:
    found: list[float | None] = court.judge(
        [Prompt(prompt)] * len(pairs), [(done(a), done(b)) for a, b in pairs]
    )
    return found


def row(court: Any) -> dict[str, Any]:
    """The one verdict in the ledger."""
    cursor = (
        court.ledger._db.execute("SELECT * FROM verdicts ORDER BY at DESC, rowid DESC LIMIT 1")
        if False
        else (court.ledger._db.execute("SELECT * FROM verdicts LIMIT 1"))
    )
    return dict(zip([column[0] for column in cursor.description], cursor.fetchone(), strict=True))


# ---- What is sent, and what is read ----------------------------------------------------------------


def test_no_proxy_gets_the_requests_to_this_machine(
    open_court: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask(open_court(honest, retries=0), ("long text", "short")) == pytest.approx([0.9])


def test_the_label_probabilities_are_the_verdict(open_court: Open) -> None:
    court = open_court(honest)
    assert ask(court, ("long text", "short"), ("short", "long text")) == pytest.approx([0.9, 0.2])
    (body, _) = court.server.requests
    assert body["max_tokens"] == 1
    assert body["logprobs"] is True
    assert body["top_logprobs"] == 20
    assert "n" not in body
    assert [message["role"] for message in body["messages"]] == ["user"]


def test_both_orders_are_asked_and_averaged(open_court: Open) -> None:
    court = open_court(honest)
    (found,) = judged(court.judge)([Group(Prompt("Q"), (done("long text"), done("short")))])
    assert found.rewards == pytest.approx(((0.9 + 1 - 0.2) / 2, 1 - (0.9 + 1 - 0.2) / 2))
    assert len(court.server.requests) == 2


@pytest.mark.parametrize("p", [1.0, 0.0])
def test_a_judge_that_always_takes_a_place_gives_one_half(open_court: Open, p: float) -> None:
    court = open_court(lambda body, number: judge_reply(body, lambda a, b: p))
    found = in_both_orders(
        court.judge, [Prompt("Q")] * 3, [(done(a), done(b)) for a, b in ("ab", "cd", "ef")]
    )
    assert found == pytest.approx([0.5] * 3)
    assert court.bench.metrics()["judge/orders_disagree"] == 1.0


def test_a_judge_that_always_says_the_same_letter_gives_one_half(open_court: Open) -> None:
    def says_a(body: dict[str, Any], number: int) -> dict[str, Any]:
        reply = judge_reply(body, longer)
        tops = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        first = min(top["token"] for top in tops)
        for top in tops:
            top["logprob"] = -0.01 if top["token"] == first else -4.6
        return reply

    court = open_court(says_a)
    texts = [(done(f"{i}"), done(f"{i} and more")) for i in range(12)]
    assert in_both_orders(court.judge, [Prompt("Q")] * 12, texts) == pytest.approx([0.5] * 12)


def test_a_verdict_is_asked_for_once(open_court: Open) -> None:
    court = open_court(honest)
    assert ask(court, ("a", "bb"), ("a", "bb")) == ask(court, ("a", "bb"), ("a", "bb"))
    assert len(court.server.requests) == 1


def test_a_verdict_says_how_it_came_about(open_court: Open) -> None:
    court = open_court(honest)
    ask(court, ("aaa", "bb"))
    found = row(court)
    assert (found["status"], found["attempts"], found["price_source"]) == ("ok", 1, "given")
    assert found["p_first"] == pytest.approx(0.9)
    assert found["cost"] == pytest.approx((found["prompt_tokens"] + 2 * found["completion_tokens"]) / 1e6)
    assert court.desk.budget.spent.cost == pytest.approx(found["cost"])
    assert court.ledger.spent().amount.tokens == found["prompt_tokens"] + 1


# ---- Servers without log-probabilities, and of other dialects --------------------------------------


def no_logprobs(body: dict[str, Any], number: int) -> dict[str, Any]:
    return judge_reply({**body, "logprobs": False}, longer)


def test_verdicts_are_sampled_where_there_are_no_log_probs(open_court: Open) -> None:
    court = open_court(no_logprobs)
    pairs = [(f"{i} is longer", f"{i}") for i in range(5)]
    assert ask(court, *pairs) == [1.0] * 5
    # Two requests find out; then samples of each, in text, until the model ends by itself.
    assert len(court.server.requests) == 2 + 5 * court.bench.samples
    assert all("logprobs" not in body and body["max_tokens"] > 1 for body in court.server.requests[2:])
    labels = {body["messages"][0]["content"].split("letter ")[1][:6] for body in court.server.requests[2:]}
    assert len(labels) > 1  # drawn anew for each sample


@pytest.mark.parametrize(
    ("refused", "text"),
    [
        ("max_tokens", "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        ("temperature", "Unsupported value: 'temperature' does not support this"),
        ("logprobs", "You are not allowed to request logprobs from this model"),
    ],
)
def test_a_parameter_that_a_server_refuses_is_left_out(open_court: Open, refused: str, text: str) -> None:
    def fussy(body: dict[str, Any], number: int) -> dict[str, Any] | Fault:
        if refused in body:
            return Fault(400, json.dumps({"error": {"message": text}}).encode())
        return judge_reply({**body, "max_tokens": 1 if body.get("logprobs") else 16}, longer)

    court = open_court(fussy, retries=0)
    found = ask(court, ("aaa", "bb"), ("b", "aaaa"))
    assert found == pytest.approx([1.0, 0.0] if refused == "logprobs" else [0.9, 0.2])
    assert sum(refused in body for body in court.server.requests) <= 3


def test_a_server_with_few_alternatives(open_court: Open) -> None:
    def five(body: dict[str, Any], number: int) -> dict[str, Any] | Fault:
        if body.get("top_logprobs", 0) > 5:
            return Fault(400, b'{"error": {"message": "top_logprobs must be at most 5"}}')
        return judge_reply(body, longer)

    court = open_court(five)
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert court.server.requests[-1]["top_logprobs"] == 5


# ---- Faults ----------------------------------------------------------------------------------------

GOOD = {"choices": [{"message": {"content": "A"}, "finish_reason": "stop"}], "model": "m"}


def changed(**parts: Any) -> Callable[[dict[str, Any], int], Any]:
    """A good reply with parts of its choice, or of itself, replaced."""

    def answer(body: dict[str, Any], number: int) -> dict[str, Any]:
        reply = judge_reply(body, longer)
        for name, value in parts.items():
            (reply if name in reply else reply["choices"][0])[name] = value
        return reply

    return answer


def tops(*values: Any) -> dict[str, Any]:
    found = [{"token": token, "logprob": p} for token, p in values]
    return {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": found}]}


@pytest.mark.parametrize(
    ("reply", "status"),
    [
        (changed(choices=[]), "failed"),
        (changed(choices=[GOOD["choices"][0], GOOD["choices"][0]]), "failed"),
        (lambda body, number: {"error": {"message": "overloaded"}}, "failed"),
        (lambda body, number: [1, 2], "failed"),
        (lambda body, number: b"<html>Sign in to this network</html>", "failed"),
        (lambda body, number: b"", "failed"),
        (changed(message={"content": 7}), "failed"),
        (lambda body, number: b" " * (2 << 20), "failed"),
        (changed(logprobs=tops(("A", float("nan")), ("B", -1.0))), "unparsed"),
        (changed(logprobs=tops(("A", 0.5), ("B", -1.0))), "unparsed"),
        (changed(logprobs=tops(("The", -0.1), ("I", -3.0))), "unparsed"),
        (changed(message={"content": None, "refusal": "I cannot"}), "refused"),
        (changed(finish_reason="content_filter"), "refused"),
    ],
)  # fmt: skip
def test_a_reply_that_is_none_makes_no_verdict(open_court: Open, reply: Any, status: str) -> None:
    def second(body: dict[str, Any], number: int) -> Any:
        return honest(body, number) if number == 0 else reply(body, number)

    court = open_court(second)
    assert ask(court, ("first one", "b")) == pytest.approx([0.9])
    assert ask(court, ("aaa", "bb")) == [None]
    assert court.ledger.counts() == {"ok": 1, status: 1}
    assert len(court.server.requests) == 2  # it was answered: no retry pays for it again
    assert court.said


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": -5, "completion_tokens": 1}, {"prompt_tokens": "9"}, {}]
)
def test_without_sensible_usage_the_worst_case_counts(open_court: Open, usage: Any) -> None:
    court = open_court(changed(usage=usage))
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert court.desk.budget.spent.tokens > 512  # a token a byte, and the template's


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_what_may_pass_is_tried_again(open_court: Open, status: int) -> None:
    court = open_court(lambda body, number: Fault(status) if number < 2 else honest(body, number))
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert row(court)["attempts"] == 3
    assert court.ledger.spent().verdicts == 1  # retries belong to it
    assert court.ledger.spent().requests == 3


@pytest.mark.parametrize("action", ["reset", "reset_headers", "reset_body"])
def test_a_broken_connection_is_tried_again_and_may_have_cost(open_court: Open, action: str) -> None:
    court = open_court(lambda body, number: Fault(action=action) if number == 0 else honest(body, number))
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert court.desk.budget.spent.tokens > 512


@pytest.mark.parametrize("action", ["hang", "trickle"])
def test_a_request_has_a_deadline(open_court: Open, action: str) -> None:
    court = open_court(
        lambda body, number: Fault(action=action) if number == 0 else honest(body, number), timeout=0.5
    )
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert row(court)["attempts"] >= 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_cannot_pass_is_an_error_at_once(open_court: Open, status: int) -> None:
    court = open_court(lambda body, number: Fault(status, b'{"error": {"message": "no such model"}}'))
    with pytest.raises(
        AnnotatorError, match=rf"all of \d+ requests failed \(the last: HTTP {status}: .*no such model"
    ):
        ask(court, *[(f"{i}", "b") for i in range(20)])
    assert len(court.server.requests) == (20 if status in (400, 422) else 1)


def test_an_empty_account_is_not_asked_again(open_court: Open) -> None:
    body = json.dumps(
        {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    ).encode()
    court = open_court(lambda *_: Fault(429, body))
    with pytest.raises(AnnotatorError, match="exceeded your quota"):
        ask(court, ("a", "b"))
    assert len(court.server.requests) == 1


def test_all_requests_failing_is_an_error_and_one_is_not(open_court: Open) -> None:
    court = open_court(
        lambda body, number: Fault(500) if "fails" in str(body) else honest(body, number), retries=1
    )
    assert ask(court, ("aaa", "bb"), ("fails", "b")) == pytest.approx([0.9, None])
    assert ask(court, ("fails too", "b")) == [None]  # the server is there: no error
    with pytest.raises(AnnotatorError, match="all of 10 requests failed"):
        ask(court, *[(f"fails {i}", "b") for i in range(10)])


def test_a_redirect_is_not_followed(open_court: Open) -> None:
    other = open_court(honest)
    court = open_court(lambda *_: Fault(307, headers=(("location", f"{other.server.url}/chat/completions"),)))
    with pytest.raises(AnnotatorError, match="redirects elsewhere"):
        ask(court, ("a", "b"))
    assert other.server.requests == []


def test_a_compressed_reply_is_refused(open_court: Open) -> None:
    court = open_court(lambda *_: Fault(200, b"x", headers=(("content-encoding", "gzip"),)), retries=0)
    with pytest.raises(AnnotatorError, match="compressed"):
        ask(court, ("a", "b"))
    assert court.server.headers[0]["accept-encoding"] == "identity"


def test_another_model_than_asked_for_is_told(open_court: Open) -> None:
    court = open_court(changed(model="other"))
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert row(court)["served_model"] == "other"
    assert any("answers as 'other'" in text for text in court.said)


def test_no_more_at_once_than_allowed(open_court: Open) -> None:
    court = open_court(honest, delay=lambda number: 0.01, at_once=4)
    ask(court, *[(f"{i}", "b") for i in range(40)])
    assert 1 < court.server.most_at_once["/v1/chat/completions"] <= 4


# ---- Waiting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": "3600"}, 3600.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_what_a_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_date_to_wait_for() -> None:
    found = retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)})
    assert found is not None
    assert 25 < found <= 30
    assert retry_after({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0.0


def test_a_server_that_asks_to_wait_is_left_alone(open_court: Open) -> None:
    times: list[float] = []

    def busy(body: dict[str, Any], number: int) -> Any:
        times.append(time.monotonic())
        return Fault(429, headers=(("retry-after", "0.3"),)) if number == 1 else honest(body, number)

    court = open_court(busy, at_once=1)
    assert None not in ask(court, *[(f"{i}", "b") for i in range(4)])
    assert times[2] - times[1] >= 0.29


def test_an_hour_is_not_waited_for(open_court: Open) -> None:
    court = open_court(lambda *_: Fault(429, headers=(("retry-after", "3600"),)))
    with pytest.raises(AnnotatorError, match=r"HTTP 429.*wait 3,600 seconds, more than --judge-max-wait 1"):
        ask(court, ("a", "b"))
    assert len(court.server.requests) == 1


def test_requests_per_minute(open_court: Open) -> None:
    times: list[float] = []

    def answer(body: dict[str, Any], number: int) -> Any:
        times.append(time.monotonic())
        return honest(body, number)

    court = open_court(answer, requests_per_minute=600)  # ten a second
    ask(court, *[(f"{i}", "b") for i in range(25)])
    assert times[-1] - times[0] >= 1.0  # a bucket of ten, and fifteen at ten a second


# ---- Secrets ---------------------------------------------------------------------------------------


def test_a_key_that_the_server_repeats_is_hidden(open_court: Open, caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-very-secret-key-42"

    def echo(body: dict[str, Any], number: int) -> Any:
        if number == 0:
            return {**judge_reply(body, longer), "model": key, "system_fingerprint": key}
        if number == 1:
            reply = judge_reply(body, longer)
            reply["choices"][0]["message"]["content"] = f"the key is {key}"
            return reply
        return Fault(401, json.dumps({"error": {"message": f"Incorrect API key provided: {key}"}}).encode())

    caplog.set_level("DEBUG")
    court = open_court(echo, key=key)
    ask(court, ("aaa", "bb"))
    ask(court, ("ccc", "bb"))
    with pytest.raises(AnnotatorError) as caught:
        ask(court, *[(f"{i}", "b") for i in range(9)])
    assert court.server.headers[0]["authorization"] == f"Bearer {key}"
    kept = [*court.ledger._db.iterdump(), *court.said, str(caught.value), repr(caught.value), caplog.text]
    assert not [text for text in kept if key in text]
    assert "[key]" in str(caught.value)
    assert caught.value.__cause__ is None


def test_what_the_environment_says_of_another_account_is_not_sent(
    open_court: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_ORG_ID", "org-1")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-1")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere.invalid/v1")
    court = open_court(honest)
    assert ask(court, ("aaa", "bb")) == pytest.approx([0.9])
    assert not {"openai-organization", "openai-project"} & court.server.headers[0].keys()


@pytest.mark.parametrize(
    ("spec", "model", "url"),
    [
        ("m@http://localhost:8000/v1", "m", "http://localhost:8000/v1"),
        ("org/model@v2@https://host/v1/", "org/model@v2", "https://host/v1"),
    ],
)
def test_an_address(spec: str, model: str, url: str) -> None:
    assert address(spec) == (model, url)


@pytest.mark.parametrize("spec", ["", "m", "m@", "@http://h/v1", "m@localhost:8000", "m@ftp://h"])
def test_what_is_no_address(spec: str) -> None:
    with pytest.raises(ConfigError, match="names no server; expected server:MODEL@URL"):
        address(spec)


@pytest.mark.parametrize(
    "url", ["https://user:secret@h/v1", "https://h/v1?api_key=secret", "https://h/v1#secret"]
)
def test_a_secret_in_the_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        address(f"m@{url}")
    assert "secret would be written" in str(caught.value)
    assert url not in str(caught.value)


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    assert key_from("MY_KEY", "http://localhost/v1") == "none"
    with pytest.raises(ConfigError, match="set the environment variable MY_KEY"):
        key_from("MY_KEY", "https://host/v1")
    monkeypatch.setenv("MY_KEY", " sk-1\n")
    assert key_from("MY_KEY", "https://host/v1") == "sk-1"


@pytest.mark.parametrize(
    ("url", "exposed"),
    [
        ("https://host/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://127.0.0.1:8000/v1", False),
        ("http://127.8.9.1/v1", False),
        ("http://[::1]:8000/v1", False),
        ("http://gpu-box:8000/v1", True),
        ("http://10.0.0.7:8000/v1", True),
        ("http://localhost.example.org/v1", True),
        ("HTTP://0x7f.example/v1", True),
    ],
)
def test_a_key_sent_without_encryption_is_detected(url: str, exposed: bool) -> None:
    assert unprotected(url) is exposed


@pytest.mark.parametrize(("key", "warned"), [("sk-12345", True), ("none", False)])
def test_a_key_sent_without_encryption_is_warned_of_once(key: str, warned: bool) -> None:
    lines: list[str] = []
    model = ServerModel(
        "m", "http://host.invalid/v1", key=key, price=Price(0.0, 0.0, "given"), options=ServerOptions()
    )
    desk = Desk(model, say=lines.append)
    for _ in range(2):
        model.ask({}, desk)
    assert [("without encryption" in line, key in line) for line in lines] == [(True, False)] * warned


def test_judges_can_be_asked_from_several_threads(open_court: Open) -> None:
    court = open_court(honest)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda i=i: found.append(ask(court, (f"thread {i}", "b")))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [[pytest.approx(0.9)]] * 4


def test_a_pace_of_few_tokens_lets_a_large_request_through() -> None:
    from palate import eventloop

    async def go() -> str:
        async with Pace(1, tokens=600).slot(5000):
            return "through"

    assert eventloop.run(go()) == "through"
