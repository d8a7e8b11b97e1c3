"""Python objects in place of names: the rows, rewards and models that a caller passes to `palate.train`.

Each is a text that describes the object, and carries the object. The text stands in messages and in
`config.json`, so all code that handles names of data, rewards and models handles these as well. The one place
that opens a name looks for the object. Nothing here is ever pickled.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

ROWS = 'a path, a hub id, a list of rows such as {"prompt": "..."}, or a `datasets.Dataset`'
"""The data that `as_data` takes, in words."""


class GivenRows(str):
    """Rows given in Python.

    Attributes:
        rows: a list of mappings, a `datasets.Dataset`, or a `datasets.DatasetDict`.
    """

    rows: Any

    def __new__(cls, rows: Any) -> Self:
        """Describe the rows, and store them."""
        count = f"{len(rows)} row{'s' * (len(rows) != 1)}"
        text = f"splits {', '.join(map(str, rows))}" if isinstance(rows, Mapping) else count
        given = super().__new__(cls, f"{text} given in Python")
        given.rows = rows
        return given

    def of_split(self, split: str) -> Iterable[Any] | None:
        """Return the rows as plain Python values; None if there are splits and this is none of them."""
        rows = self.rows
        if isinstance(rows, Mapping):
            if split not in rows:
                return None
            rows = rows[split]
        # A data set may return tensors or arrays; without a format it returns plain values.
        return rows if isinstance(rows, list | tuple) else rows.with_format(None)


class GivenReward(str):
    """A function, a `Scorer` or a `Judge` given in Python, with its weight.

    Attributes:
        reward: the object.
        weight: factor of its rewards in a sum of several.
        kind: `function`, `scorer` or `judge`.
    """

    reward: Any
    weight: float
    kind: str

    def __new__(cls, reward: Any, weight: float = 1.0) -> Self:
        """Describe the reward, and store it."""
        kind = _kind(reward)
        own = reward if kind != "function" else _unwrapped(reward)
        name = getattr(own, "name", None) or getattr(own, "__qualname__", type(own).__qualname__)
        factor = "" if weight == 1.0 else f"{weight:g}*"
        given = super().__new__(cls, f"{factor}{kind} {name} given in Python")
        given.reward, given.weight, given.kind = reward, weight, kind
        return given


class GivenModel(str):
    """A transformers model given in Python, with its tokenizer. Its text is the model's `name_or_path`.

    Attributes:
        network: the model.
        tokenizer: its tokenizer; None stands for the tokenizer of `name_or_path`.
    """

    network: Any
    tokenizer: Any | None

    def __new__(cls, network: Any, tokenizer: Any | None = None) -> Self:
        """Use the model's name as text, and store both."""
        name = getattr(network, "name_or_path", "") or getattr(network.config, "name_or_path", "")
        given = super().__new__(cls, name or f"{type(network).__name__} given in Python")
        given.network, given.tokenizer = network, tokenizer
        return given

    @property
    def named(self) -> bool:
        """False for a model that was made in Python and never loaded."""
        return not self.endswith(" given in Python")


def is_judge(reward: str) -> bool:
    """Return True for a reward that compares completions, whose numbers hold within one prompt only."""
    return reward.startswith("ranker:") or (isinstance(reward, GivenReward) and reward.kind == "judge")


# ---- From values to these ---------------------------------------------------------------------------


def as_data(value: Any) -> Any:
    """Return rows as `GivenRows`, a path as text, and all other values as they are.

    Raises:
        ValueError: it is a list without any row, or a container that is not a data set.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        if value and not any(isinstance(row, Mapping) for row in value):
            raise ValueError(f"the first row is a {type(value[0]).__name__}, expected {ROWS}")
        return GivenRows(value)
    datasets = sys.modules.get("datasets")  # it is imported if there is an object of one of its classes
    if datasets is not None and isinstance(value, datasets.Dataset | datasets.DatasetDict):
        return GivenRows(value)
    if value is None or isinstance(value, str | bool | int | float | Mapping):
        return value
    raise ValueError(f"it is a {type(value).__name__}, expected {ROWS}")


def as_rewards(value: Any) -> Any:
    """Return rewards as a list, with objects as `GivenReward`; a pair `(weight, reward)` has a weight.

    Raises:
        ValueError: a class is given instead of an object.
    """
    if isinstance(value, str) or callable(value) or _is_weighted(value):
        value = [value]
    return [_as_reward(item) for item in value] if isinstance(value, list | tuple) else value


def as_model(value: Any) -> Any:
    """Return a model, or a pair of a model and its tokenizer, as `GivenModel`; a path as text."""
    if isinstance(value, Path):
        return str(value)
    model, tokenizer = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
    return GivenModel(model, tokenizer) if is_model(model) else value


def is_model(value: Any) -> bool:
    """Return True for an object that looks like a model of transformers or peft."""
    return hasattr(value, "named_parameters") and hasattr(value, "config")


def or_given(convert: Callable[[Any], Any]) -> Callable[[Any, Callable[[Any], Any]], Any]:
    """Return a pydantic wrap validator of a text that keeps the results of `convert` for Python objects."""

    def validate(value: Any, handler: Callable[[Any], Any]) -> Any:
        made = convert(value)
        return made if isinstance(made, GivenRows | GivenReward | GivenModel) else handler(made)

    return validate


def _as_reward(item: Any) -> Any:
    weight, reward = item if _is_weighted(item) else (1.0, item)
    if isinstance(reward, str):
        return reward if reward is item else f"{float(weight)!r}*{reward}"
    if inspect.isclass(reward):
        raise ValueError(f"{reward.__name__} is a class, expected an object, as {reward.__name__}()")
    return GivenReward(reward, float(weight)) if callable(reward) else item


def _is_weighted(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return False
    return isinstance(value[0], int | float) and not isinstance(value[0], bool)


def _kind(reward: Any) -> str:
    """Scorers and judges have a name; a judge's second parameter is called `pairs`."""
    if not isinstance(getattr(reward, "name", None), str):
        return "function"
    try:
        second = list(inspect.signature(reward).parameters)[1:2]
    except (TypeError, ValueError):
        second = []
    return "judge" if second == ["pairs"] else "scorer"


def _unwrapped(function: Any) -> Any:
    """Return the function under `functools.partial`."""
    while hasattr(function, "func") and hasattr(function, "keywords"):
        function = function.func
    return function
