"""The declaration of a method, which the command line, the launcher and the table of methods read.

A method has one or more *ways*: a function, the configuration that it takes, and the data that it learns
from. The first way is the method's own. Several methods that sample have a second way, on preference pairs
from data. The field `variant` of a way's configuration tells the ways of a method apart: it lists the values
that take this way. So a configuration has the fields of its way and no others, and the type of a
configuration tells the way.

Text from files and flags becomes a configuration in three steps, none of which imports torch:

    METHOD.options             one class with the fields of all ways, for help and for unknown keys
    METHOD.choose(values)      the class of the way that `variant` takes; refuses fields that do nothing in it
    cls.model_validate(...)    the configuration, of the values that are fields of the class

`METHOD.configure(values)` does the last two at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import create_model

from palate.config import MethodConfig
from palate.errors import ConfigError
from palate.recipe import Recipe

if TYPE_CHECKING:
    from palate.learn import Learner
    from palate.run import Run

__all__ = ["METHOD_GROUPS", "Data", "Method", "Recipe", "Unit", "Way"]

METHOD_GROUPS = ("supervised", "RL", "offline", "online")

Data = Literal["prompts", "pairs", "demonstrations"]
"""The data that a way learns from."""

Unit = Literal["prompt", "pair", "completion", "group", "demonstration"]
"""The records that a batch counts."""

VARIANT = "variant"
"""The field of a configuration that takes one of several ways."""


@dataclass(frozen=True)
class Way:
    """One way to run a method.

    Attributes:
        train: the algorithm. On prompts it takes `(policy, annotate, prompts, cfg, run)`; on pairs and
            demonstrations `(policy, records, cfg, run, *, held_out=())`, with `Pair` or `Example` records.
        config: its configuration. Where a method has several ways, its field `variant` lists the values that
            take this way.
        learns_from: prompts to sample from, preference pairs, or completions to imitate.
        batches_of: the records that `batch_size` counts.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    learns_from: Data
    batches_of: Unit = "pair"

    @property
    def variants(self) -> tuple[str, ...]:
        """Values of `variant` that take this way; none where the method has one way."""
        field = self.config.model_fields.get(VARIANT)
        return () if field is None else get_args(field.annotation)


@dataclass(frozen=True)
class Method:
    """One method of the family.

    Attributes:
        train, config, learns_from, batches_of: the method's own way, see `Way`.
        summary: one line for people who choose.
        paper: the source.
        group: its place in the family.
        recipe: the needs of the paper's recipe, for the table of methods.
        others: further ways, each taken by its own values of `variant`.
        learner: loads the learner from (cfg, *, total_steps, seed); None loads a `Policy`. A learner that is
            no policy cannot be sampled from, and so is not compared with the start.
        summarise: numbers for `summary.json` from (learner, run, held-out records), after training; None
            gives the first and the last measurement on the held-out records.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    summary: str
    paper: str
    group: Literal["supervised", "RL", "offline", "online"]
    learns_from: Data
    recipe: Recipe
    batches_of: Unit = "pair"
    others: tuple[Way, ...] = ()
    learner: Callable[..., Learner] | None = None
    summarise: Callable[[Any, Run, Sequence[Any]], dict[str, float]] | None = None

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.train.__name__.replace("_", "-")

    @property
    def ways(self) -> tuple[Way, ...]:
        """All ways, the method's own first."""
        return (Way(self.train, self.config, self.learns_from, self.batches_of), *self.others)

    def defaults(self) -> dict[str, Any]:
        """Fields of the method's own way and their default values."""
        return {name: f.default for name, f in self.config.model_fields.items() if not f.is_required()}

    def way_of(self, cfg: MethodConfig) -> Way:
        """Return the way whose configuration `cfg` is.

        Raises:
            ConfigError: it is the configuration of another method.
        """
        for way in self.ways:
            if isinstance(cfg, way.config):
                return way
        expected = " or a ".join(way.config.__name__ for way in self.ways)
        raise ConfigError(f"{self.name} takes a {expected}, got a {type(cfg).__name__}")

    def variant(self, value: str | None) -> Way:
        """Return the way that a value of `variant` takes; None and unknown values take the method's own."""
        return next((way for way in self.ways if value in way.variants), self.ways[0])

    @cached_property
    def options(self) -> type[MethodConfig]:
        """A class with the fields of all ways, to describe them; configurations are of a way's own class."""
        if not self.others:
            return self.config
        values: Any = Literal[tuple(value for way in self.ways for value in way.variants)]
        return create_model(
            f"{self.config.__name__}Options",
            __base__=tuple(way.config for way in self.ways),
            variant=(values, self.config.model_fields[VARIANT]),
        )

    def choose(self, values: Mapping[str, Any]) -> type[MethodConfig]:
        """Return the configuration class of the way that `values` take by their `variant`.

        Args:
            values: of fields by name; text, as in flags, or converted.

        Raises:
            ConfigError: fields are given that do nothing in this way; their default value is no request.
        """
        way = self.variant(values.get(VARIANT))
        others = (name for name in self.options.model_fields if name not in way.config.model_fields)
        idle = [name for name in others if self._asks(name, values)]
        if idle:
            variant = values.get(VARIANT, self.options.model_fields[VARIANT].default)
            takers = [w for w in self.ways if all(name in w.config.model_fields for name in idle)]
            raise ConfigError(
                f"variant is {variant}, which learns from {_SOURCES[way.learns_from]}, so "
                f"{' and '.join(idle)} would do nothing; leave {'it' if len(idle) == 1 else 'them'} out, or "
                f"take variant {' or '.join(value for w in takers for value in w.variants) or 'another'}"
            )
        return way.config

    def configure(self, values: Mapping[str, Any]) -> MethodConfig:
        """Return the configuration of the way that `values` take.

        Raises:
            ConfigError: fields are given that do nothing in this way.
            pydantic.ValidationError: a value is missing or wrong.
        """
        config = self.choose(values)
        idle = self.options.model_fields.keys() - config.model_fields.keys()
        return config.model_validate({name: value for name, value in values.items() if name not in idle})

    def _asks(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether `values` give a field, and something else than its default."""
        default = self.options.model_fields[name].get_default(call_default_factory=True, validated_data={})
        return name in values and values[name] != default and str(values[name]) != str(default)


_SOURCES: Mapping[Data, str] = {
    "prompts": "completions that it samples",
    "pairs": "the pairs of the data and samples nothing",
    "demonstrations": "the demonstrations of the data",
}
