from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest

from palate.annotate import code_key
from palate.annotate.rules import length


def short(completions: list[str], *, target: int = 10) -> list[float]:
    return [float(len(text) < target) for text in completions]


def aimed(target: object) -> Callable[..., list[float]]:
    def reward(completions: list[str]) -> list[float]:
        return [float(text == target) for text in completions]

    return reward


class Scoring:
    def __init__(self, target: int) -> None:
        self.name = "scoring"
        self.target = target
        self._seen: list[object] = []

    def __call__(self, prompts: Any, completions: Any) -> list[float]:
        self._seen.append(prompts)
        return [float(self.target) for _ in completions]


def compiled(source: str) -> Any:
    names: dict[str, Any] = {}
    exec(source, names)
    return names["f"]


SAME: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
    (lambda: short, lambda: short),
    (lambda: aimed(3), lambda: aimed(3)),
    (lambda: aimed({"b", "a"}), lambda: aimed({"a", "b"})),
    (lambda: functools.partial(short, target=3), lambda: functools.partial(short, target=3)),
    (lambda: Scoring(1), lambda: Scoring(1)),
    (lambda: Scoring(1).__call__, lambda: Scoring(1).__call__),
    (lambda: length(4), lambda: length(4)),
    (lambda: compiled("def f(x): return 1"), lambda: compiled("def f(x): return 1")),
    (lambda: aimed(object()), lambda: aimed(object())),  # the type counts, an address must not
]
OTHER: list[tuple[Callable[[], Any], Callable[[], Any]]] = [
    (lambda: short, lambda: aimed(3)),
    (lambda: aimed(3), lambda: aimed(4)),
    (lambda: aimed([1, 2]), lambda: aimed([2, 1])),
    (lambda: aimed(1), lambda: aimed("1")),
    (lambda: functools.partial(short, target=3), lambda: functools.partial(short, target=4)),
    (lambda: Scoring(1), lambda: Scoring(2)),
    (lambda: Scoring(1).__call__, lambda: Scoring(2).__call__),
    (lambda: length(4), lambda: length(5)),
    (lambda: compiled("def f(x): return 1"), lambda: compiled("def f(x): return 2")),
    (lambda: compiled("def f(x): return max(x)"), lambda: compiled("def f(x): return min(x)")),
    (lambda: compiled("def f(x, y=1): return y"), lambda: compiled("def f(x, y=2): return y")),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_the_same_code_has_the_same_key(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert code_key(one()) == code_key(other())


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other_code_or_values_have_another_key(one: Callable[[], Any], other: Callable[[], Any]) -> None:
    assert code_key(one()) != code_key(other())


def test_private_state_does_not_count() -> None:
    scorer = Scoring(1)
    before = code_key(scorer)
    scorer([], ["a"])
    assert code_key(scorer) == before


def test_an_object_that_holds_itself() -> None:
    scorer = Scoring(1)
    scorer.me = scorer  # type: ignore[attr-defined]
    assert code_key(scorer) == code_key(scorer)
