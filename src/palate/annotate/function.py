"""A user's Python function as a scorer, called as TRL calls reward functions."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from palate.annotate import loop
from palate.annotate.userfiles import import_file
from palate.errors import AnnotatorError
from palate.journal import content_key, key_of
from palate.types import Completion, Prompt


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

    A call that raises is repeated completion by completion, so that one failure costs one reward. With
    `kept` the other rewards are saved, and a resumed run repeats only the calls that failed.

    Attributes:
        kept: saves rewards as they arrive; None saves nothing.
        say: shows a message to the user.

    Raises:
        AnnotatorError: the function raises, or returns the wrong number of rewards or a value that is
            neither a number nor None. The message shows the prompt.
    """

    def __init__(self, function: Callable[..., Any], name: str | None = None) -> None:
        self.function = function
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        parameters = inspect.signature(function).parameters
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self._takes = set(parameters)
        self.kept: Answers | None = None
        self.say: Callable[[str], None] = lambda text: None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        """One reward per completion."""
        if self.kept is None:
            return self._asked(prompts, completions, lambda i, reward: None)
        # The key covers the whole call: a function may compare a completion with its neighbours.
        contents = [(content_key(p, c), dict(p.columns)) for p, c in zip(prompts, completions, strict=True)]
        call = key_of("function", self.name, contents)
        keys = [key_of(call, i) for i in range(len(contents))]
        known = self.kept.answers(keys)
        left = [i for i, key in enumerate(keys) if key not in known]
        kept = self.kept
        if left:
            known |= dict(
                zip(
                    [keys[i] for i in left],
                    self._asked(
                        [prompts[i] for i in left],
                        [completions[i] for i in left],
                        lambda j, reward: kept.keep_answers({keys[left[j]]: reward}),
                    ),
                    strict=True,
                )
            )
            kept.keep_answers(known)
        return [known[key] for key in keys]

    def _asked(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        keep: Callable[[int, float | None], None],
    ) -> list[float | None]:
        """Return the rewards of one call, or of single calls if it raises; `keep` saves the latter."""
        try:
            return self._rewards(prompts, completions)
        except _Raised as error:
            if len(prompts) == 1:
                raise error.explained from error.cause
            first = error
        rewards: list[float | None] = []
        failed: list[_Raised] = []
        for i in range(len(prompts)):
            try:
                (reward,) = self._rewards(prompts[i : i + 1], completions[i : i + 1])
            except _Raised as error:
                failed.append(error)
                continue
            keep(i, reward)
            rewards.append(reward)
        if failed:
            raise failed[0].explained from failed[0].cause
        self.say(
            f"{first.explained}; called one by one, it gave a reward for each of {len(rewards)} completions"
        )
        return rewards

    def _rewards(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        rewards = self._call(prompts, completions)
        if len(rewards) != len(completions):
            raise AnnotatorError(
                f"reward function {self.name} gave {len(rewards)} rewards for {len(completions)} "
                f"completions; expected one each (first prompt: {_shown(prompts[0])})"
            )
        return [self._number(reward, prompt) for reward, prompt in zip(rewards, prompts, strict=True)]

    def _call(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Any]:
        columns = sorted({name for prompt in prompts for name in prompt.columns})
        arguments: dict[str, Any] = {
            **{name: [prompt.columns.get(name) for prompt in prompts] for name in columns},
            "prompts": [
                p.content if isinstance(p.content, str) else [dict(m) for m in p.content] for p in prompts
            ],
            "completions": [
                c.text if isinstance(p.content, str) else [{"role": "assistant", "content": c.text}]
                for p, c in zip(prompts, completions, strict=True)
            ],
            "completion_ids": [list(c.token_ids) for c in completions],
        }
        if not self._takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self._takes}
        # A user's function may raise any exception.
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = loop.run(_awaited(result))
            if isinstance(result, Mapping | Set):
                raise TypeError(f"it gave a {type(result).__name__}, expected a list with a number for each")
            return list(result) if isinstance(result, Iterable) else [result]
        except Exception as error:
            # In a call with several completions, any of them may be the cause.
            where = (
                f"prompt: {_shown(prompts[0])}, completion: {completions[0].text[:80]!r}"
                if len(prompts) == 1
                else f"in a call with {len(prompts)} completions"
            )
            explained = AnnotatorError(
                f"reward function {self.name} raised {type(error).__name__}: {error} ({where})"
            )
            raise _Raised(explained, error) from error

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


class _Raised(Exception):  # noqa: N818
    """A reward function raised: the error to report, and its cause."""

    def __init__(self, explained: AnnotatorError, cause: Exception) -> None:
        super().__init__(str(explained))
        self.explained, self.cause = explained, cause


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


def _shown(prompt: Prompt) -> str:
    return f"{prompt.text[:80]!r}" + (f" at {prompt.where}" if prompt.where else "")
