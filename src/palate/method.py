"""The declaration of a method, which the command line, the launcher and the table of methods read.

A method has one or more *ways*: a function, its configuration and the kind of data that it learns from. The
first way is the method's main way. Several methods that sample have a second way, on preference pairs from
data. The field `variant` of a configuration lists the values that select its way. A configuration has
exactly the fields of its way, so its type identifies the way.

Text from files and flags becomes a configuration in three steps, none of which imports torch:

    METHOD.options             one class with the fields of all ways, for help and for unknown keys
    METHOD.choose(values)      the class of the way that `variant` selects; an error for fields without effect
    cls.model_validate(...)    the configuration, from the values that are fields of the class

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
from palate.recipe import Recipe, Share
from palate.spending import Rows, Spending

if TYPE_CHECKING:
    from palate.learn import Learner
    from palate.run import Run

__all__ = ["METHOD_GROUPS", "Data", "Method", "Recipe", "Share", "Unit", "Way"]

METHOD_GROUPS = ("supervised", "RL", "offline", "online")

Data = Literal["prompts", "pairs", "demonstrations"]
"""The data that a way learns from."""

Unit = Literal["prompt", "pair", "completion", "group", "demonstration"]
"""The records that a batch counts."""

VARIANT = "variant"
"""The field of a configuration that selects one of several ways."""


@dataclass(frozen=True)
class Way:
    """One way to run a method.

    Attributes:
        train: the algorithm. On prompts it takes `(policy, annotate, prompts, cfg, run)` and then the
            learners of `Method.beside`; on pairs and demonstrations `(policy, records, cfg, run, *,
            held_out=())`, with `Pair` or `Example` records.
        config: its configuration. If a method has several ways, its field `variant` lists the values that
            select this way.
        learns_from: prompts to sample from, preference pairs, or completions to imitate.
        batches_of: the records that `batch_size` counts.
        spends: returns upper bounds of the way's spending from its configuration and its rows.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    learns_from: Data
    batches_of: Unit = "pair"
    spends: Callable[[Any, Rows], Spending] | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        """The values of `variant` that select this way; empty if the method has only one way."""
        field = self.config.model_fields.get(VARIANT)
        return () if field is None else get_args(field.annotation)


@dataclass(frozen=True)
class Method:
    """One method of the family.

    Attributes:
        train, config, learns_from, batches_of, spends: the method's main way, see `Way`.
        summary: one line that helps people to choose a method.
        paper: the source.
        group: its place in the family.
        recipe: the needs of the paper's recipe, for the table of methods.
        others: further ways, each with its own values of `variant`.
        learner: loads the learner from (cfg, *, total_steps, seed); None loads a `Policy`. Other learners
            cannot generate text, so they are not compared with the model before training.
        beside: loads the other learners of a run, such as a value function, from (learner, cfg, *, seed);
            None for a method with one learner. `train` on prompts takes them as further arguments.
        summarise: returns numbers for `summary.json` from (learner, run, held-out records) after training;
            None reports the first and the last measurement on the held-out records.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    summary: str
    paper: str
    group: Literal["supervised", "RL", "offline", "online"]
    learns_from: Data
    recipe: Recipe
    batches_of: Unit = "pair"
    spends: Callable[[Any, Rows], Spending] | None = None
    others: tuple[Way, ...] = ()
    learner: Callable[..., Learner] | None = None
    beside: Callable[..., tuple[Learner, ...]] | None = None
    summarise: Callable[[Any, Run, Sequence[Any]], dict[str, float]] | None = None
    share: Share | None = None

    @property
    def name(self) -> str:
        """The method's name on the command line."""
        return self.train.__name__.replace("_", "-")

    @property
    def ways(self) -> tuple[Way, ...]:
        """All ways; the main way comes first."""
        main = Way(self.train, self.config, self.learns_from, self.batches_of, self.spends)
        return (main, *self.others)

    def defaults(self) -> dict[str, Any]:
        """Return the default values of the main way, by field name."""
        return {name: f.default for name, f in self.config.model_fields.items() if not f.is_required()}

    def way_of(self, cfg: MethodConfig) -> Way:
        """Return the way that a configuration belongs to.

        Raises:
            ConfigError: `cfg` is the configuration of another method.
        """
        for way in self.ways:
            if isinstance(cfg, way.config):
                return way
        expected = " or a ".join(way.config.__name__ for way in self.ways)
        raise ConfigError(f"{self.name} expects a {expected}, but got a {type(cfg).__name__}")

    def variant(self, value: str | None) -> Way:
        """Return the way that a value of `variant` selects; None and unknown values select the main way."""
        return next((way for way in self.ways if value in way.variants), self.ways[0])

    @cached_property
    def options(self) -> type[MethodConfig]:
        """A class with the fields of all ways, for help only; configurations belong to a single way."""
        if not self.others:
            return self.config
        values: Any = Literal[tuple(value for way in self.ways for value in way.variants)]
        return create_model(
            f"{self.config.__name__}Options",
            __base__=tuple(way.config for way in self.ways),
            variant=(values, self.config.model_fields[VARIANT]),
        )

    def choose(self, values: Mapping[str, Any]) -> type[MethodConfig]:
        """Return the configuration class of the way that `values["variant"]` selects.

        Args:
            values: field values by name, as text (as in flags) or converted.

        Raises:
            ConfigError: fields without effect in this way are set to something other than their default.
        """
        way = self.variant(values.get(VARIANT))
        others = (name for name in self.options.model_fields if name not in way.config.model_fields)
        idle = [name for name in others if self._sets(name, values)]
        if idle:
            variant = values.get(VARIANT, self.options.model_fields[VARIANT].default)
            takers = [w for w in self.ways if all(name in w.config.model_fields for name in idle)]
            raise ConfigError(
                f"variant is {variant}, which learns from {_SOURCES[way.learns_from]}, so "
                f"{' and '.join(idle)} would have no effect; leave {'it' if len(idle) == 1 else 'them'} out "
                f"or use variant {' or '.join(v for w in takers for v in w.variants) or 'another'}"
            )
        return way.config

    def configure(self, values: Mapping[str, Any]) -> MethodConfig:
        """Return the configuration of the way that `values` select.

        Raises:
            ConfigError: fields without effect in this way are set.
            pydantic.ValidationError: a value is missing or wrong.
        """
        config = self.choose(values)
        idle = self.options.model_fields.keys() - config.model_fields.keys()
        return config.model_validate({name: value for name, value in values.items() if name not in idle})

    def _sets(self, name: str, values: Mapping[str, Any]) -> bool:
        """Return whether `values` set a field to something other than its default."""
        default = self.options.model_fields[name].get_default(call_default_factory=True, validated_data={})
        return name in values and values[name] != default and str(values[name]) != str(default)


_SOURCES: Mapping[Data, str] = {
    "prompts": "completions that it samples",
    "pairs": "pairs in the data and samples nothing",
    "demonstrations": "demonstrations in the data",
}
