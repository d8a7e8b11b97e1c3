"""The run's clock: it explains a step that suddenly takes much longer."""

from __future__ import annotations

import pytest

from palate.run.clock import FEWEST, SLOW, Clock


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which the test advances."""
    time = [0.0]
    monkeypatch.setattr("palate.run.clock.time.perf_counter", lambda: time[0])
    return time


def step(clock: Clock, now: list[float], seconds: float, tokens: int = 10) -> str | None:
    clock.begin_step()
    now[0] += seconds
    clock.report("sample", tokens)
    return clock.explain_slow_step()


def test_a_step_that_suddenly_takes_longer_is_explained_once(now: list[float]) -> None:
    clock = Clock()
    assert [step(clock, now, 1.0) for _ in range(FEWEST)] == [None] * FEWEST
    line = step(clock, now, 2.0 * SLOW)
    assert line is not None
    assert f"{2 * SLOW} times" in line
    assert "--threads 1" in line
    assert step(clock, now, 2.0 * SLOW) is None


def test_more_tokens_are_no_reason(now: list[float]) -> None:
    clock = Clock()
    assert [step(clock, now, 1.0) for _ in range(FEWEST)] == [None] * FEWEST
    assert step(clock, now, 2.0 * SLOW, tokens=20 * SLOW) is None


def test_the_first_steps_have_nothing_to_compare_with(now: list[float]) -> None:
    clock = Clock()
    assert step(clock, now, 1.0) is None
    assert step(clock, now, 2.0 * SLOW) is None
