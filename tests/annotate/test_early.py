from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from palate.annotate import Early
from palate.errors import AnnotatorError
from palate.types import Completion, Group, Prompt

WAIT = 10.0


def group(text: str) -> Group:
    return Group(Prompt(text), (Completion(text, (1,)),))


class Slow:
    """An annotator that waits for a signal in each call and records its calls."""

    def __init__(self, *, fails: bool = False) -> None:
        self.calls: list[list[str]] = []
        self.started, self.free = threading.Semaphore(0), threading.Semaphore(0)
        self.fails, self._inside = fails, threading.Lock()

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        assert self._inside.acquire(blocking=False), "two calls at the same time"
        try:
            self.calls.append([g.prompt.text for g in groups])
            self.started.release()
            assert self.free.acquire(timeout=WAIT)
            if self.fails:
                raise AnnotatorError("no answer")
            return [g.annotated((float(len(g.prompt.text)),)) for g in groups]
        finally:
            self._inside.release()


def test_groups_are_annotated_while_others_are_sampled() -> None:
    slow = Slow()
    early = Early(slow)
    early.begin(group("a"))
    assert slow.started.acquire(timeout=WAIT)  # before anything is asked for
    early.begin(group("bb"))
    early.begin(group("ccc"))
    early.begin(group("a"))
    for _ in range(3):
        slow.free.release()
    found = early([group("ccc"), group("a"), group("dddd"), group("ccc")])
    assert [g.rewards for g in found] == [(3.0,), (1.0,), (4.0,), (3.0,)]
    early.close()
    assert sorted(text for call in slow.calls for text in call).count("ccc") == 1
    assert slow.calls[0] == ["a"]
    assert ["dddd"] in slow.calls  # nobody had begun it


def test_a_call_waits_for_its_own_groups_only() -> None:
    slow = Slow()
    early = Early(slow)
    early.begin(group("a"))
    assert slow.started.acquire(timeout=WAIT)
    early.begin(group("next batch"))
    slow.free.release()
    assert [g.rewards for g in early([group("a")])] == [(1.0,)]
    assert slow.started.acquire(timeout=WAIT)  # the next batch is under way, and its call has not returned
    slow.free.release()
    assert [g.rewards for g in early([group("next batch")])] == [(10.0,)]
    early.close()


def test_a_failure_appears_where_the_result_is_needed() -> None:
    slow = Slow(fails=True)
    early = Early(slow)
    for _ in range(2):
        slow.free.release()
    early.begin(group("a"))
    with pytest.raises(AnnotatorError, match="no answer"):
        early([group("a")])
    slow.fails = False
    slow.free.release()
    early.begin(group("a"))
    assert [g.rewards for g in early([group("a")])] == [(1.0,)]
    early.close()


def test_after_closing_nothing_begins() -> None:
    slow = Slow()
    early = Early(slow)
    early.begin(group("a"))
    assert slow.started.acquire(timeout=WAIT)
    early.begin(group("b"))
    slow.free.release()
    early.close()
    early.begin(group("c"))
    assert slow.calls == [["a"]]
