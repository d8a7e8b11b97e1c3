import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from palate.annotate.function import FunctionScorer
from palate.annotate.rowwise import constants_of
from palate.types import Completion, Prompt


def judge(text: object, *_: object) -> float:
    return float(len(str(text)))


def comprehension(completions, **_):
    """Judge each."""
    return [judge(c) for c in completions]


def with_columns(prompts, completions, **columns) -> list[float]:
    return [judge(c, p, a) for p, c, a in zip(prompts, completions, columns["answer"], strict=True)]


async def waiting(completions):
    return [judge(c) for c in completions]


def loop(completions, answer):
    rewards: list[float] = []
    for text, wanted in zip(completions, answer, strict=False):
        if text == wanted:
            rewards.append(1.0)
            continue
        rewards.append(0.0)
    return rewards


def constant(completions, scale=2.0, *, model="small"):
    return [judge(c, model) * scale for c in completions]


class Held:
    def __call__(self, completions: list[str]) -> list[float]:
        return [self.judge(c) for c in completions]

    def method(self, completions: list[str]) -> list[float]:
        return [self.judge(c) for c in completions]

    def judge(self, text: str) -> float:
        return judge(text)


@pytest.mark.parametrize("function", [comprehension, with_columns, waiting, loop, Held(), Held().method])
def test_functions_that_handle_one_row_after_another(function: Callable[..., Any]) -> None:
    assert constants_of(function) == frozenset()


def compares(completions):
    return [judge(c) / max(len(one) for one in completions) for c in completions]


def compares_in_loop(completions):
    rewards = []
    for text in completions:
        rewards.append(judge(text) - sum(rewards))
    return rewards


def counts(completions):
    rewards = []
    for i, text in enumerate(completions):
        rewards.append(judge(text) + i)
    return rewards


def ranks(completions):
    order = sorted(completions)
    return [order.index(c) for c in completions]


def ranked(completions):
    rewards = []
    for text in completions:
        rewards.append(judge(text))
    rewards.sort()
    return rewards


def remembers(completions):
    rewards, seen = [], set()
    for text in completions:
        rewards.append(float(text not in seen))
        seen.add(text)
    return rewards


def leaves_early(completions):
    rewards = []
    for text in completions:
        if not text:
            break
        rewards.append(judge(text))
    return rewards


def filters(completions):
    return [judge(c) for c in completions if c]


def whole_column(completions, **columns):
    return [judge(c, columns) for c in completions]


def first_prompt(completions, prompts):
    return [judge(c, prompts[0]) for c in completions]


def pool(completions):
    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(judge, completions))


def normalised(function: Callable[..., list[float]]) -> Callable[..., list[float]]:
    @functools.wraps(function)
    def wrapper(completions: list[str]) -> list[float]:
        rewards = function(completions)
        return [reward / max(rewards) for reward in rewards]

    return wrapper


@normalised
def decorated(completions):
    return [judge(c) for c in completions]


@pytest.mark.parametrize(
    "function",
    [
        *(compares, compares_in_loop, counts, ranks, ranked, remembers, leaves_early, filters, whole_column),
        *(first_prompt, pool, decorated, lambda completions: [judge(c) for c in completions]),
        *(max, print, functools.partial(comprehension), type("Empty", (), {})),
    ],
)
def test_other_functions_keep_their_whole_call(function: Callable[..., Any]) -> None:
    assert constants_of(function) is None


def test_a_constant_that_a_column_replaces_is_a_list() -> None:
    assert constants_of(constant) == {"scale", "model"}
    calls: list[int] = []

    def counted(completions, model="small"):
        return [calls.append(len(model)) or 1.0 for c in completions]

    scorer = FunctionScorer(counted)
    two = [Completion("a", (1,)), Completion("b", (2,))]
    scorer([Prompt("Q")] * 2, two)
    assert calls == [5, 5]
    scorer([Prompt("Q", columns={"model": "large"})] * 2, two)
    assert calls[2:] == [2, 2]  # the whole column


@pytest.mark.parametrize("function", [comprehension, constant, waiting, Held()])
def test_rewards_are_those_of_one_whole_call(function: Callable[..., Any]) -> None:
    rows = [Completion("a" * n, (n,)) for n in range(1, 5)]
    scorer = FunctionScorer(function)
    by_row = scorer([Prompt("Q")] * 4, rows)
    scorer._constants = None
    assert by_row == scorer([Prompt("Q")] * 4, rows)
