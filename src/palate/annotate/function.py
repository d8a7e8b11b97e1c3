"""A user's Python function as a scorer, called as TRL calls reward functions."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import time
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from palate import eventloop
from palate.annotate.rowwise import constants_of
from palate.annotate.userfiles import import_file
from palate.errors import AnnotatorError
from palate.journal import content_key, key_of
from palate.types import Completion, Prompt

IN_A_ROW = 3
"""Failures of a function, one row after the other, after which no further row is asked."""

SAVE_SECONDS = 0.2
"""Seconds after which rewards that arrive one by one are saved, so that quick ones share a write."""

Row = tuple[Prompt, Completion]

Rewards = dict[int, float | None]
"""Rewards by the number of their row."""


Excuse = Callable[[Prompt, Completion, AnnotatorError], None]
"""Receives a row without a reward, and the error of the function that should have given it."""


class _Raised(NamedTuple):
    """An exception of a reward function: the error to report, and its cause."""

    explained: AnnotatorError
    cause: Exception


class Answers(Protocol):
    """A store that saves rewards of functions as they arrive, such as a ledger of verdicts."""

    def answers(self, keys: Sequence[str]) -> dict[str, float | None]:
        """Return the saved rewards among these keys."""

    def keep_answers(self, rewards: Mapping[str, float | None]) -> None:
        """Save rewards by key."""


class FunctionScorer:
    """Calls `f(prompts, completions, completion_ids, **columns) -> list of numbers or None`.

    A prompt given as chat turns is passed as a list of turns, and so is its completion; a text prompt
    and its completion are passed as texts. `columns` are the data's further columns, a list each. The
    function receives the arguments that its signature names, or all of them if it takes `**kwargs`. It may
    be `async`; all calls share one event loop, so a client can be created once and used in every call.

    One failure costs one reward. A function that handles its rows one after another, such as
    `return [judge(c) for c in completions]`, is called row by row. Any other function is called with all
    rows. If it raises, the rows without an answer are asked one by one: all of them, or those that follow if
    the function yields its rewards, or those whose reward is an exception, as
    `asyncio.gather(..., return_exceptions=True)` gives them. A row that fails is asked once more. With
    `kept` the answers are saved, and a resumed run asks only the rows without one.

    Attributes:
        kept: saves rewards as they arrive; None saves nothing.
        saved_as: the name under which rewards are saved.
        excuse: receives each row that fails twice with its error, and the row has no reward; None raises.
        say: shows a message to the user.

    Raises:
        AnnotatorError: the function raises, or returns the wrong number of rewards or a value that is
            neither a number nor None. The message shows the prompt.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.saved_as = self.name
        parameters = inspect.signature(function).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes = set(parameters)
        self._constants = constants_of(function)
        self.kept: Answers | None = None
        self.excuse: Excuse | None = None
        self.say: Callable[[str], None] = lambda text: None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """One reward per completion."""
        rows = list(zip(prompts, completions, strict=True))
        if self.kept is None:
            return self._asked(rows, lambda rewards: None)
        # The key covers the whole call: a function may compare a completion with its neighbours.
        contents = [(content_key(prompt, completion), dict(prompt.columns)) for prompt, completion in rows]
        call = key_of("function", self.saved_as, contents)
        keys = [key_of(call, i) for i in range(len(contents))]
        known = self.kept.answers(keys)
        left = [i for i, key in enumerate(keys) if key not in known]
        kept = self.kept
        if left:
            rewards = self._asked(
                [rows[i] for i in left],
                lambda rewards: kept.keep_answers({keys[left[j]]: reward for j, reward in rewards.items()}),
            )
            known |= dict(zip([keys[i] for i in left], rewards, strict=True))
        return [known[key] for key in keys]

    def _asked(self, rows: Sequence[Row], keep: Callable[[Rewards], None]) -> list[float | None]:
        """Return the reward of each row; `keep` saves rewards as they arrive, by the row's number."""
        rewards: Rewards = {}
        first: _Raised | None = None
        if not self._is_rowwise(rows):
            first = self._ask_together(rows, rewards)
            keep(rewards)
        failures: dict[int, _Raised] = {}
        for attempt in range(2):
            failures = self._ask_singly(rows, rewards, keep)
            failure = next(iter(failures.values()), None)
            first = first or failure
            if failure is None:
                break
            if self._gives_up(rows, rewards, failures) or (attempt and self.excuse is None):
                raise failure.explained from failure.cause
        for i, failed in failures.items():
            assert self.excuse is not None, "without it the first failure has been raised"
            self.excuse(*rows[i], failed.explained)
            rewards[i] = None
        if first is not None and not failures:
            self.say(f"{first.explained}; asked again row by row, it gave every reward that was missing")
        return [rewards[i] for i in range(len(rows))]

    def _is_rowwise(self, rows: Sequence[Row]) -> bool:
        """Return whether the function may be called with one row at a time."""
        if self._constants is None:
            return False
        lists = {"prompts", "completions", "completion_ids"}.union(*(prompt.columns for prompt, _ in rows))
        return not self._constants & lists

    def _ask_together(self, rows: Sequence[Row], rewards: Rewards) -> _Raised | None:
        """Call the function with all rows and store its rewards; return the error that it raises."""
        values, raised = self._call(rows)
        if raised is None and len(values) != len(rows):
            raise AnnotatorError(
                f"reward function {self.name} gave {len(values)} rewards for {len(rows)} "
                f"completions; expected one each (first prompt: {_shown(rows[0][0])})"
            )
        for i, (value, row) in enumerate(zip(values, rows, strict=False)):
            if isinstance(value, Exception):
                raised = raised or self._raised(value, [row])
            else:
                rewards[i] = self._number(value, row[0])
        return raised

    def _ask_singly(
        self, rows: Sequence[Row], rewards: Rewards, keep: Callable[[Rewards], None]
    ) -> dict[int, _Raised]:
        """Call the function once for each row without a reward; return the errors that it raises, by row.

        It stops after `IN_A_ROW` failures in a row, because then the function fails for every row; with
        `excuse`, if as many prompts failed and no row succeeded.
        """
        failures: dict[int, _Raised] = {}
        unsaved: Rewards = {}
        in_a_row, saved = 0, time.monotonic()
        try:
            for i in [i for i in range(len(rows)) if i not in rewards]:
                single: Rewards = {}
                error = self._ask_together([rows[i]], single)
                in_a_row = in_a_row + 1 if error else 0
                if error:
                    failures[i] = error
                    if self._gives_up(rows, rewards, failures) if self.excuse else in_a_row == IN_A_ROW:
                        break
                    continue
                rewards[i] = unsaved[i] = single[0]
                if time.monotonic() - saved > SAVE_SECONDS:
                    keep(unsaved)
                    unsaved, saved = {}, time.monotonic()
        finally:
            keep(unsaved)
        return failures

    def _gives_up(self, rows: Sequence[Row], rewards: Rewards, failures: Mapping[int, _Raised]) -> bool:
        """Return whether the function fails for every row, so that to excuse each of them hides a mistake."""
        prompts = {rows[i][0].id for i in failures}
        return self.excuse is not None and not rewards and len(prompts) >= IN_A_ROW

    def _call(self, rows: Sequence[Row]) -> tuple[list[Any], _Raised | None]:
        """Return the values that the function gives, and the error that it raises."""
        columns = sorted({name for prompt, _ in rows for name in prompt.columns})
        arguments: dict[str, Any] = {
            **{name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns},
            "prompts": [
                p.content if isinstance(p.content, str) else [dict(m) for m in p.content] for p, _ in rows
            ],
            "completions": [
                c.text if isinstance(p.content, str) else [{"role": "assistant", "content": c.text}]
                for p, c in rows
            ],
            "completion_ids": [list(c.token_ids) for _, c in rows],
        }
        if not self._takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self._takes}
        values: list[Any] = []
        # A user's function may raise any exception, and one that yields its rewards raises after some.
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = eventloop.run(_awaited(result))
            if inspect.isasyncgen(result):
                eventloop.run(_gathered(result, values))
            elif isinstance(result, Mapping | Set):
                raise TypeError(f"it gave a {type(result).__name__}, expected a list with a number for each")
            elif isinstance(result, Iterable):
                values.extend(result)
            else:
                values.append(result)
        except Exception as error:
            # A function that yields its rewards raises at the first row without one.
            at = len(values)
            return values, self._raised(error, rows[at : at + 1] if 0 < at < len(rows) else rows)
        return values, None

    def _raised(self, error: Exception, rows: Sequence[Row]) -> _Raised:
        # In a call with several completions, any of them may be the cause.
        prompt, completion = rows[0]
        where = (
            f"prompt: {_shown(prompt)}, completion: {completion.text[:80]!r}"
            if len(rows) == 1
            else f"in a call with {len(rows)} completions"
        )
        return _Raised(
            AnnotatorError(f"reward function {self.name} raised {type(error).__name__}: {error} ({where})"),
            error,
        )

    def _number(self, reward: Any, prompt: Prompt) -> float | None:
        if reward is None:
            return None
        try:
            if isinstance(reward, str | bytes):  # "0.5" would pass for a number
                raise TypeError
            return float(reward)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise AnnotatorError(
                f"reward function {self.name} gave {reward!r}; expected a number or None "
                f"(prompt: {_shown(prompt)})"
            ) from error


def load_function(path: str) -> FunctionScorer:
    """Return the scorer for `module:function` or `file.py:function`.

    Raises:
        AnnotatorError: the module, file or function does not exist, or the import fails.
    """
    where, _, name = path.rpartition(":")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    except AnnotatorError:
        raise
    except Exception as error:  # a user's module may raise anything
        raise AnnotatorError(
            f"reward {path!r}: importing {where} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise AnnotatorError(
            f"reward {path!r}: {where} has no function {name!r}; it has {', '.join(there[:8]) or 'none'}"
        )
    try:
        return FunctionScorer(function, name=path)
    except ValueError as error:  # some built-in functions have no signature to look at
        raise AnnotatorError(f"reward {path!r}: {error}; wrap it in a Python function") from error


def add_working_directory() -> None:
    """Make the modules in the working directory importable, as `python -m` does."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def _from_module(where: str) -> Any:
    add_working_directory()
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if not f"{where}.".startswith(f"{error.name}."):
            raise  # the module exists, but one of its own imports does not
        raise AnnotatorError(
            f"reward module {where!r} cannot be found ({error}); expected module:function on the Python "
            "path or file.py:function"
        ) from error


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise AnnotatorError(f"reward file {str(path)!r} does not exist; expected file.py:function")
    return import_file(path)


async def _awaited(result: Any) -> Any:
    return await result


async def _gathered(result: AsyncIterable[Any], values: list[Any]) -> None:
    """Append the values of an asynchronous generator to a list as they arrive."""
    async for value in result:
        values.append(value)


def _shown(prompt: Prompt) -> str:
    return f"{prompt.text[:80]!r}" + (f" at {prompt.where}" if prompt.where else "")
