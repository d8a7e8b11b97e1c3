from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.annotate import FunctionScorer, load_function
from palate.annotate.judges.ledger import Ledger
from palate.errors import AnnotatorError
from palate.types import Completion, Prompt

PROMPTS = [
    Prompt("two?", {"answer": 2, "level": "easy"}, "data.jsonl:1"),
    Prompt("three?", {"answer": 3}, "data.jsonl:2"),
]
COMPLETIONS = [Completion("2", (50, 9)), Completion("4", (52, 9))]


def call(function: Callable[..., Any]) -> list[float | None]:
    return FunctionScorer(function)(PROMPTS, COMPLETIONS)


def complaint(function: Callable[..., Any]) -> str:
    with pytest.raises(AnnotatorError) as caught:
        call(function)
    return str(caught.value)


# ---- What the function is given --------------------------------------------------------------------


def test_only_what_the_signature_names() -> None:
    def right(completions: list[str], answer: list[int]) -> list[float]:
        return [float(c == str(a)) for c, a in zip(completions, answer, strict=True)]

    assert call(right) == [1.0, 0.0]


def test_everything_for_keywords() -> None:
    given: dict[str, Any] = {}

    def all_of_it(**columns: Any) -> list[float]:
        given.update(columns)
        return [0.0, 0.0]

    call(all_of_it)
    assert given == {
        "prompts": ["two?", "three?"],
        "completions": ["2", "4"],
        "completion_ids": [[50, 9], [52, 9]],
        "answer": [2, 3],
        "level": ["easy", None],  # a column that a row lacks is None there
    }


def test_a_column_cannot_hide_what_was_sampled() -> None:
    prompts = [Prompt("Q", {"completions": "from the data", "prompts": "from the data"})]

    def both(prompts: list[str], completions: list[str]) -> list[float]:
        assert (prompts, completions) == (["Q"], ["2"])
        return [1.0]

    assert FunctionScorer(both)(prompts, COMPLETIONS[:1]) == [1.0]


def test_a_conversation_arrives_as_turns() -> None:
    chat = Prompt(({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))

    def turns(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert prompts == [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            "two?",
        ]
        assert completions == [[{"role": "assistant", "content": "2"}], "4"]
        return [1.0, 2.0]

    assert FunctionScorer(turns)([chat, PROMPTS[0]], COMPLETIONS) == [1.0, 2.0]


def test_defaults_of_the_function_stay_its_own() -> None:
    def scaled(completions: list[str], scale: float = 3.0) -> list[float]:
        return [scale for _ in completions]

    assert call(scaled) == [3.0, 3.0]


async def slow_length(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(c)) for c in completions]


def test_an_async_function() -> None:
    assert call(slow_length) == [1.0, 1.0]


def test_an_async_function_within_a_running_loop() -> None:
    # As in a notebook, where asyncio.run refuses to start a second loop.
    async def notebook() -> list[float | None]:
        return call(slow_length)

    assert asyncio.run(notebook()) == [1.0, 1.0]


@pytest.mark.parametrize(
    "rewards",
    [
        (1, True),
        np.array([1.0, 1.0], dtype=np.float32),
        torch.ones(2),
        (float(x) for x in (1, 1)),
        [np.float64(1), torch.tensor(1)],
    ],
)
def test_numbers_of_any_kind(rewards: Any) -> None:
    found = call(lambda completions: rewards)
    assert found == [1.0, 1.0]
    assert all(type(x) is float for x in found)


def test_none_and_nan_are_left_to_the_annotator() -> None:
    first, second = call(lambda completions: [None, math.nan])
    assert first is None
    assert second is not None
    assert math.isnan(second)


def test_names() -> None:
    assert FunctionScorer(slow_length).name == "slow_length"
    assert FunctionScorer(slow_length, "rewards.py:slow").name == "rewards.py:slow"

    class Callable_:  # noqa: N801
        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0] * len(completions)

    assert FunctionScorer(Callable_()).name == "Callable_"


# ---- What goes wrong in it -------------------------------------------------------------------------


def test_a_function_that_raises_is_shown_with_the_row_that_did_it() -> None:
    def divide(completions: list[str], answer: list[int]) -> list[float]:
        return [1 / (a - 3) for a in answer]

    text = complaint(divide)
    assert "reward function divide raised ZeroDivisionError: division by zero" in text
    assert "prompt: 'three?' at data.jsonl:2, completion: '4'" in text  # the second of the two


def test_a_function_that_fails_on_the_batch_only_is_asked_one_by_one() -> None:
    def one_at_a_time(completions: list[str]) -> list[float]:
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [float(completions[0])]

    said: list[str] = []
    scorer = FunctionScorer(one_at_a_time)
    scorer.say = said.append
    assert scorer(PROMPTS, COMPLETIONS) == [2.0, 4.0]
    assert "raised RuntimeError: too many" in said[0]
    assert "asked again row by row, it gave every reward that was missing" in said[0]


class Flaky:
    """A paid judge that fails at some of its questions."""

    __name__ = "flaky"

    def __init__(self, *fails: int) -> None:
        self.asked: list[str] = []
        self.fails = fails

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.judge(text) for text in completions]

    def judge(self, text: str) -> float:
        self.asked.append(text)
        if len(self.asked) - 1 in self.fails:
            raise TimeoutError("no answer")
        return float(text)


EIGHT = [Completion(str(i), (i + 1,)) for i in range(8)]


def test_a_line_that_drops_once_costs_no_answer() -> None:
    flaky = Flaky(4)
    scorer = FunctionScorer(flaky)
    said: list[str] = []
    scorer.kept, scorer.say = Ledger(), said.append
    assert scorer([Prompt("Q")] * 8, EIGHT) == [float(i) for i in range(8)]
    assert flaky.asked == [*"01234567", "4"]  # only the row without an answer
    (line,) = said
    assert "raised TimeoutError: no answer (prompt: 'Q', completion: '4')" in line


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path) -> None:
    first = Flaky(6, 8)  # the seventh row, both times
    scorer = FunctionScorer(first, "judge")
    scorer.kept = Ledger(tmp_path / "j.db")
    with pytest.raises(AnnotatorError, match=r"judge raised TimeoutError: no answer .*completion: '6'\)"):
        scorer([Prompt("Q")] * 8, EIGHT)
    assert first.asked == [*"01234567", "6"]
    resumed = Flaky()
    scorer = FunctionScorer(resumed, "judge")
    scorer.kept = Ledger(tmp_path / "j.db")
    assert scorer([Prompt("Q")] * 8, EIGHT) == [float(i) for i in range(8)]
    assert resumed.asked == ["6"]
    assert scorer([Prompt("Q")] * 7, EIGHT[:7])[6] == 6.0  # other neighbours: asked again
    assert len(resumed.asked) == 8


def test_a_judge_that_is_down_is_not_asked_about_every_row() -> None:
    flaky = Flaky(*range(2, 100))
    scorer = FunctionScorer(flaky)
    scorer.kept = kept = Ledger()
    with pytest.raises(AnnotatorError, match="completion: '2'"):
        scorer([Prompt("Q")] * 8, EIGHT)
    assert flaky.asked == [*"01234", *"234"]
    flaky.fails = ()
    assert scorer([Prompt("Q")] * 8, EIGHT) == [float(i) for i in range(8)]
    assert flaky.asked[8:] == [*"234567"]
    assert scorer.kept is kept


def test_ctrl_c_keeps_what_was_answered() -> None:
    def judge(completions: list[str]) -> list[float]:
        return [stopped(text) for text in completions]

    asked: list[str] = []

    def stopped(text: str) -> float:
        asked.append(text)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return float(text)

    scorer = FunctionScorer(judge)
    scorer.kept = Ledger()
    with pytest.raises(KeyboardInterrupt):
        scorer([Prompt("Q")] * 8, EIGHT)
    assert scorer([Prompt("Q")] * 8, EIGHT) == [float(i) for i in range(8)]
    assert asked == [*"012345", *"567"]


def lazily(flaky: Flaky) -> Callable[..., Any]:
    return lambda completions: map(flaky.judge, completions)


def yielding(flaky: Flaky) -> Callable[..., Any]:
    def score(completions: list[str]) -> Iterator[float]:
        yield from (flaky.judge(text) for text in completions)

    return score


def async_yielding(flaky: Flaky) -> Callable[..., Any]:
    async def score(completions: list[str]) -> AsyncIterator[float]:
        for text in completions:
            yield flaky.judge(text)

    return score


def gathering(flaky: Flaky) -> Callable[..., Any]:
    async def one(text: str) -> float:
        return flaky.judge(text)

    async def score(completions: list[str]) -> list[Any]:
        return await asyncio.gather(*(one(text) for text in completions), return_exceptions=True)

    return score


@pytest.mark.parametrize("kind", [lazily, yielding, async_yielding, gathering])
def test_answers_that_a_function_gives_before_it_fails_are_kept(kind: Callable[..., Any]) -> None:
    flaky = Flaky(4)
    scorer = FunctionScorer(kind(flaky))
    said: list[str] = []
    scorer.say = said.append
    assert scorer([Prompt("Q")] * 8, EIGHT) == [float(i) for i in range(8)]
    assert sorted(flaky.asked) == sorted([*"01234567", "4"])
    assert "raised TimeoutError: no answer (prompt: 'Q', completion: '4')" in said[0]


def test_async_functions_share_a_loop() -> None:
    loops = []

    async def score(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    scorer = FunctionScorer(score)
    scorer(PROMPTS, COMPLETIONS)
    scorer(PROMPTS, COMPLETIONS)
    assert loops[0] is loops[1]


def test_a_column_that_the_data_lack() -> None:
    def needs(completions: list[str], solution: list[str]) -> list[float]:
        return [0.0] * len(completions)

    assert "raised TypeError" in complaint(needs)
    assert "'solution'" in complaint(needs)


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0] * 3, 0.5, "a"])
def test_a_wrong_number_of_rewards(rewards: Any) -> None:
    text = complaint(lambda completions: rewards)
    count = len(rewards) if isinstance(rewards, list) else 1
    assert (
        f"gave {count} rewards for 2 completions; expected one each (first prompt: 'two?' at data.j" in text
    )


@pytest.mark.parametrize(
    ("reward", "shown"),
    [
        ("good", "'good'"),
        ("0.5", "'0.5'"),  # text is no number, even where it reads as one
        (b"1", "b'1'"),
        ([1.0], "[1.0]"),
        (1j, "1j"),
        (10**400, "1000"),
        (torch.ones(2), "tensor([1., 1.])"),
    ],
)
def test_a_reward_that_is_no_number(reward: Any, shown: str) -> None:
    text = complaint(lambda completions: [0.0, reward])
    assert f"gave {shown}" in text
    assert "expected a number or None (prompt: 'three?' at data.jsonl:2)" in text


# ---- load_function ---------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty working directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


SOURCE = """
LIMIT = 3
def short(completions): return [float(len(c) < LIMIT) for c in completions]
def other(completions): return [0.0 for _ in completions]
"""


@pytest.mark.parametrize("spec", ["my_rewards:short", "my_rewards.py:short", "{folder}/my_rewards.py:short"])
def test_a_function_beside_the_data(folder: Path, spec: str) -> None:
    (folder / "my_rewards.py").write_text(SOURCE)
    spec = spec.format(folder=folder)
    scorer = load_function(spec)
    assert scorer(PROMPTS, [Completion("ok", (1,)), Completion("long", (1,))]) == [1.0, 0.0]
    assert scorer.name == spec


@pytest.mark.parametrize("name", ["mine", "rich"])  # also that of a package, which stays what it is
def test_a_file_may_have_dataclasses_with_postponed_annotations(folder: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import InitVar, dataclass\n"
        "@dataclass\nclass Rule:\n    limit: int\n    scale: InitVar[float] = 1.0\n"
        "def short(completions): return [float(len(c) < Rule(3).limit) for c in completions]\n"
    )
    assert load_function(f"{name}.py:short")(PROMPTS, COMPLETIONS) == [1.0, 1.0]
    assert hasattr(__import__("rich"), "print")


POOL = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from helper import words

def one(text):
    return float(words(text))

def executor(completions, how, **_):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(how[0])) as pool:
        return list(pool.map(one, completions))

def pool(completions, how, **_):
    with multiprocessing.get_context(how[0]).Pool(1) as pool:
        return pool.map(one, completions)
"""


# A name of a package, and one that is no identifier, are as good as any.
@pytest.mark.parametrize(
    ("name", "function", "how"),
    [("my-rewards.v2", "executor", "fork"), ("rich", "pool", "fork"), ("rich", "executor", "spawn")],
)
def test_a_file_may_use_a_process_pool(folder: Path, name: str, function: str, how: str) -> None:
    place = folder / "rewards of mine"
    place.mkdir()
    (place / "helper.py").write_text("def words(text): return len(text.split())")
    (place / f"{name}.py").write_text(POOL)
    prompts = [Prompt("a", columns={"how": how}), Prompt("b", columns={"how": how})]
    scorer = load_function(f"{place.name}/{name}.py:{function}")
    assert scorer(prompts, [Completion("one two", (1,)), Completion("three", (2,))]) == [2.0, 1.0]


def test_a_file_is_imported_once_until_it_changes(folder: Path) -> None:
    file = folder / "rewards.py"
    file.write_text(
        "seen = []\ndef add(completions): seen.append(1); return [len(seen)] * len(completions)\n"
    )
    first, second = load_function("rewards.py:add"), load_function(f"{file}:add")
    assert (first(PROMPTS, COMPLETIONS)[0], second(PROMPTS, COMPLETIONS)[0]) == (1.0, 2.0)
    file.write_text("def add(completions): return [7.0 for _ in completions]\n")
    assert load_function("rewards.py:add")(PROMPTS, COMPLETIONS)[0] == 7.0


def test_a_neighbour_with_the_name_of_an_installed_module_is_refused(folder: Path) -> None:
    (folder / "rich.py").write_text("ours = 1")
    (folder / "rewards.py").write_text("def f(completions):\n    from rich import ours\n    return [ours]\n")
    text = failure("rewards.py:f")
    assert "imports 'rich', which is a file beside it and also an installed module" in text
    assert text.endswith("; rename rich.py")


def failure(spec: str) -> str:
    with pytest.raises(AnnotatorError) as caught:
        load_function(spec)
    return str(caught.value)


@pytest.mark.parametrize("spec", ["no_such_module:f", "json.no_such:f", "no.such.module:f"])
def test_a_module_that_is_not_there(folder: Path, spec: str) -> None:
    where = spec.partition(":")[0]
    assert f"reward module {where!r} cannot be found" in failure(spec)


def test_a_file_that_is_not_there(folder: Path) -> None:
    assert "reward file 'no_such.py' does not exist; expected file.py:function" in failure("no_such.py:f")


@pytest.mark.parametrize("spec", ["my_rewards:shrot", "my_rewards.py:LIMIT", "my_rewards:"])
def test_no_such_function_lists_those_there(folder: Path, spec: str) -> None:
    (folder / "my_rewards.py").write_text(SOURCE)
    where, _, name = spec.partition(":")
    assert f"{where} has no function {name!r}; it has short, other" in failure(spec)


@pytest.mark.parametrize("where", ["bad", "bad.py"])
@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("1 / 0", "importing {} raised ZeroDivisionError: division by zero"),
        ("def f(:", "importing {} raised SyntaxError: "),
        # The module is there; what it needs is not.
        ("import no_such_package", "importing {} raised ModuleNotFoundError: No module named 'no_such_pack"),
    ],
)
def test_an_import_that_raises(folder: Path, where: str, source: str, shown: str) -> None:
    (folder / "bad.py").write_text(source)
    text = failure(f"{where}:f")
    assert shown.format(where) in text
    assert "cannot be found" not in text


def test_a_builtin_without_a_signature() -> None:
    assert "builtins:max" in failure("builtins:max")


@pytest.mark.parametrize("given", [{0: 5.0, 1: 1.0}, {0.5, 1.0}])
def test_what_has_no_order_is_no_list_of_rewards(given: object) -> None:
    with pytest.raises(AnnotatorError, match=r"expected a list"):
        FunctionScorer(lambda completions: given, name="odd")([Prompt("a")] * 2, [Completion("x", (1,))] * 2)


# ---- Excused rows -----------------------------------------------------------------------------------


def test_excused_rows_have_no_reward_and_the_others_are_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []
    excused: list[str] = []

    def raises(completions: list[str]) -> list[float]:
        asked.extend(completions)
        if "bad" in completions:
            raise ValueError("no")
        return [float(len(c)) for c in completions]

    scorer = FunctionScorer(raises)
    scorer.excuse = lambda prompt, completion, error: excused.append(f"{completion.text}: {error}")
    texts = ["a", "bad", "ccc"]
    prompts, completions = [Prompt(t) for t in texts], [Completion(t, (1,)) for t in texts]
    assert scorer(prompts, completions) == [1.0, None, 3.0]
    assert len(excused) == 1
    assert excused[0].startswith("bad: reward function")
    assert asked.count("a") == asked.count("ccc") == 2  # together, then alone
    assert scorer(prompts[1:2], completions[1:2]) == [None]


def test_a_function_that_fails_for_every_prompt_is_not_excused() -> None:
    asked: list[str] = []

    def broken(completions: list[str]) -> list[float]:
        asked.extend(completions)
        raise ValueError("no")

    scorer = FunctionScorer(broken)
    scorer.excuse = lambda *_: None
    prompts, completions = [Prompt(f"q{i}") for i in range(50)], [Completion("x", (1,))] * 50
    with pytest.raises(AnnotatorError, match="raised ValueError: no"):
        scorer(prompts, completions)
    assert len(asked) < 60
