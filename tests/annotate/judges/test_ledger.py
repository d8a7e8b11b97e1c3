from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.records import Amount, Question, Verdict, labels_of
from palate.annotate.judges.template import Template
from palate.errors import RunError
from palate.testing import Fault, FaultyServer, judge_reply
from palate.types import Completion, Prompt

TEMPLATE = Template.load("pairwise")
IDENTITY = {"model": "m", "url": "u"}


def asked(first: str = "a", second: str = "b", prompt: str = "Q", **changes: Any) -> Question:
    labels = labels_of(prompt, (first, second))
    return Question(TEMPLATE, prompt, (first, second), **{"labels": labels, **changes})


def keep(ledger: Ledger, question: Question, verdict: Verdict) -> str:
    key = question.key(IDENTITY)
    ledger.done(ledger.sent(key, Amount(100, 1.0)), Amount(10, 0.5), question, key, "m", verdict)
    return key


GOOD = Verdict("ok", (0.75, 0.25), 0.9, True, raw="A", finish="stop", cost=0.5, changed=2)


# ---- Keys ------------------------------------------------------------------------------------------


def test_a_key_says_all_that_a_verdict_depends_on() -> None:
    other = Template("{{prompt}}{{first}}{{second}}{{label_first}}{{label_second}}", "pairwise", name="x")
    questions = [
        asked(), asked("b", "a"), asked(prompt="R"), asked(criteria="Be brief."), asked(repeat=1),
        asked(sampled=True), asked(reasoning=9), asked(labels=("X", "Y")), asked(labels=("P", "Q")),
        Question(other, "Q", ("a", "b"), labels_of("Q", ("a", "b"))),
        asked(prompt=({"role": "user", "content": "Q"},)),  # type: ignore[arg-type]
    ]  # fmt: skip
    keys = {question.key(IDENTITY) for question in questions} | {asked().key({"model": "n"})}
    assert len(keys) >= len(questions)  # one of the two label pairs may be the drawn one
    assert asked().key(IDENTITY) == asked().key(dict(reversed(IDENTITY.items())))


def test_keys_are_the_same_in_every_process() -> None:
    code = (
        "from palate.annotate.judges.records import Question, labels_of\n"
        "from palate.annotate.judges.template import Template\n"
        "q = Question(Template.load('pairwise'), 'Q', ('a', 'b'), labels_of('Q', ('a', 'b')))\n"
        "print(q.key({'model': 'm', 'url': 'u'}), q.nonce)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.split() == [asked().key(IDENTITY), asked().nonce]


def test_both_orders_have_the_same_labels_and_marks_of_their_own() -> None:
    assert all(labels_of("Q", (f"{i}", "x")) == labels_of("Q", ("x", f"{i}")) for i in range(20))
    assert len({labels_of("Q", (f"{i}", "x")) for i in range(60)}) == 6
    assert asked("a", "b").nonce != asked("b", "a").nonce


# ---- Rows ------------------------------------------------------------------------------------------


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "j.db")
    key = keep(ledger, asked(), GOOD)
    ledger.close()
    again = Ledger(tmp_path / "j.db")
    assert again.known([key, "other"]) == {key: GOOD}
    assert again.spent().amount == Amount(10, 0.5)
    assert again.counts() == {"ok": 1}


def test_a_failure_in_transport_is_noted_and_not_reused() -> None:
    ledger = Ledger()
    key = keep(ledger, asked(), Verdict("failed", note="HTTP 500"))
    assert ledger.known([key]) == {}
    assert ledger.counts() == {"failed": 1}
    keep(ledger, asked(), GOOD)
    assert ledger.known([key]) == {key: GOOD}
    assert (ledger.spent().verdicts, ledger.spent().requests) == (1, 2)


def test_what_was_unparsed_is_not_asked_again() -> None:
    ledger = Ledger()
    key = keep(ledger, asked(), Verdict("unparsed", raw="Both!", note="expected A or B"))
    assert ledger.known([key])[key].status == "unparsed"


def test_what_was_sent_and_never_answered_counts_in_full() -> None:
    ledger = Ledger()
    ledger.sent("k", Amount(100, 1.0))
    keep(ledger, asked(), GOOD)
    spent = ledger.spent()
    assert spent.amount == Amount(110, 1.5)
    assert (spent.verdicts, spent.unanswered) == (2, 1)
    assert ledger.was_sent("k")
    assert not ledger.was_sent("l")


def test_a_cache_across_runs_is_free(tmp_path: Path) -> None:
    cache = tmp_path / "cache.db"
    first = Ledger(tmp_path / "1.db", cache)
    key = keep(first, asked(), GOOD)
    keep(first, asked("c", "d"), Verdict("failed"))
    second = Ledger(tmp_path / "2.db", cache)
    found = second.known([key, asked("c", "d").key(IDENTITY)])
    assert found[key].probabilities == GOOD.probabilities
    assert found[key].cost == 0.0
    assert len(found) == 1
    assert second.spent().amount == Amount()
    assert second.spent().reused == 1
    cache.unlink()
    assert Ledger(tmp_path / "2.db").known([key])  # the run keeps what it has used


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "j.db"
    path.write_text("not a database, but long enough to be looked at" * 100)
    with pytest.raises(RunError, match=r"verdicts in .*j.db' cannot be opened: file is not a database"):
        Ledger(path)


def test_answers_of_functions() -> None:
    ledger = Ledger()
    ledger.keep_answers({"a": 1.5, "b": None})
    assert ledger.answers(["a", "b", "c"]) == {"a": 1.5, "b": None}


# ---- A run of 200 verdicts -------------------------------------------------------------------------

RUN = """
import sys
from palate.annotate.base import in_both_orders
from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.judging import Bench, PairwiseJudge
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.prices import Price
from palate.annotate.judges.server import ServerModel, ServerOptions
from palate.annotate.judges.template import Template
from palate.types import Completion, Prompt

url, path = sys.argv[1:]
options = ServerOptions(backoff=0.01, timeout=20, retries=2, at_once=8)
model = ServerModel("m", url, key="k", price=Price(1, 1, "given"), options=options)
ledger = Ledger(path)
desk = Desk(model, ledger, Budget(Limits(), ledger.spent()), print)
judge = PairwiseJudge(Bench(desk, Template.load("pairwise")))
texts = [("a" * (i % 7 + 1) + str(i), "b" * (i % 5 + 1)) for i in range(100)]
texts = [(Completion(a, (1,)), Completion(b, (1,))) for a, b in texts]
for start in range(0, 100, 20):
    in_both_orders(judge, [Prompt("Q")] * 20, texts[start : start + 20])
"""


def faulty(body: dict[str, Any], number: int) -> Any:
    """One reply in ten is bad, of another kind each time."""
    good = judge_reply(body, lambda a, b: 0.9 if len(a) > len(b) else 0.1)
    if number % 10 != 3:
        return good
    choice = good["choices"][0]
    bad = [[], [{**choice, "logprobs": {"content": []}}], [{**choice, "finish_reason": "content_filter"}]]
    kinds = [
        *[Fault(429, headers=(("retry-after", "0.01"),)), Fault(500), Fault(503), Fault(400)],
        *[Fault(body=b"<html></html>"), Fault(action="reset"), Fault(action="reset_body")],
        *[Fault(body=json.dumps({**good, "choices": choices}).encode()) for choices in bad],
    ]
    return kinds[number // 10 % len(kinds)]


def test_200_verdicts_with_faults_and_a_kill(tmp_path: Path) -> None:
    script, path = tmp_path / "run.py", tmp_path / "journal.db"
    script.write_text(textwrap.dedent(RUN))
    at_once = 8
    with FaultyServer(faulty, delay=lambda number: 0.01) as server:
        command = [sys.executable, str(script), server.url, str(path)]
        killed = subprocess.Popen(command)
        while len(server.requests) < 90 and killed.poll() is None:
            time.sleep(0.005)
        assert killed.poll() is None, "it was killed in the middle"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        before = rows(path)
        subprocess.run(command, check=True, timeout=100)
        delivered = dict(server.delivered)
    after = rows(path)
    good = {key for key, status in after.items() if status == "ok"}
    assert len(after) == 200  # each question has its row, good or bad
    assert {key for key, status in before.items() if status == "ok"} <= good  # what was there stays
    assert 0 < 200 - len(good) <= 20  # bad ones are counted
    # All good replies are kept, and no more were paid for twice than were in flight at the kill.
    twice = sum(count - 1 for count in delivered.values())
    assert twice <= at_once
    assert len(good) == len(delivered)
    with sqlite3.connect(path) as db:
        wrong = db.execute(
            "SELECT count(*) FROM verdicts WHERE status != 'ok' AND p_first IS NOT NULL"
        ).fetchone()
        labels = db.execute("SELECT DISTINCT round(p_first, 3) FROM verdicts WHERE status = 'ok'").fetchall()
    assert wrong == (0,)  # none became a label
    assert {p for (p,) in labels} == {0.9, 0.1}
    assert Ledger(path).spent().unanswered <= at_once


def rows(path: Path) -> dict[str, str]:
    with sqlite3.connect(path) as db:
        return dict(db.execute("SELECT key, status FROM verdicts").fetchall())


def test_a_kill_leaves_what_was_in_flight_as_spent(tmp_path: Path, open_court: Callable[..., Any]) -> None:
    ledger = Ledger(tmp_path / "j.db")
    ledger.sent("lost", Amount(700, 0.01))
    court = open_court(lambda body, number: judge_reply(body, lambda a, b: 0.9), ledger=ledger)
    assert court.desk.budget.spent == Amount(700, 0.01)
    court.judge([Prompt("Q")], [(Completion("a", (1,)), Completion("b", (1,)))])
    assert court.desk.budget.verdicts == 2
