"""`palate plan`: the cost of a run before it starts, and the methods that fit what a user has."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from functools import cache, partial
from typing import Any

from pydantic import create_model

from palate.cli.command import Command, Group
from palate.config import MethodConfig
from palate.planning.options import ChooseOptions, PlanOptions

CHOICE = "choose"
"""The member that chooses among methods: `palate plan --have ...`."""


@cache
def with_plan(cls: type[MethodConfig]) -> type[MethodConfig]:
    """Return a configuration class with the options of a plan besides its own."""
    both = create_model(f"Planned{cls.__name__}", __base__=(PlanOptions, cls))
    both.unoffered = getattr(cls, "unoffered", frozenset())  # type: ignore[attr-defined]
    return both  # type: ignore[return-value]


def plan(name: str, config: Any) -> int:
    """Print the plan of a run."""
    from rich.console import Console

    from palate.cli.planned import plan_json, show_plan
    from palate.methods import METHODS
    from palate.planning.plan import plan_run
    from palate.quiet import quieted

    with quieted():
        made = plan_run(METHODS[name], config, count=config.pilot, devices=config.devices)
    if config.json_only:
        print(jsonlib.dumps(plan_json(made)))
    else:
        show_plan(made, Console())
    return 0


def choose(config: Any) -> int:
    """Print the methods that fit, best first, and what the others miss."""
    from rich.console import Console

    from palate.cli.planned import choices_json, show_choices
    from palate.planning.choose import choose as chosen
    from palate.quiet import quieted

    with quieted():
        choices = chosen(config)
    if config.json_only:
        print(jsonlib.dumps(choices_json(choices)))
    else:
        show_choices(choices, Console())
    return 0


class Plans(Mapping[str, Command]):
    """The plans of all methods by name, each created on access, and the choice among them.

    Args:
        methods: the methods by name; it imports a method's file on access.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self._methods = methods

    def __getitem__(self, name: str) -> Command:
        """Return the command of a method, or the choice."""
        if name == CHOICE:
            return Command(
                CHOICE, "Choose a method for what you have.", choose, config=ChooseOptions,
                usage="Usage: palate plan --have prompts,pairs,... [OPTIONS]",
            )  # fmt: skip
        method = self._methods[name]
        return Command(
            name,
            method.summary,
            partial(plan, name),
            config=with_plan(method.options),
            choose=lambda values: with_plan(method.choose(_of_method(values))),
        )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the choice and the methods."""
        yield CHOICE
        yield from self._methods

    def __len__(self) -> int:
        """Return the number of commands."""
        return 1 + len(self._methods)

    def __contains__(self, name: object) -> bool:
        """Return True for a command, without importing a method."""
        return name == CHOICE or name in self._methods


def _of_method(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in PlanOptions.model_fields}


def members() -> Plans:
    """Return the commands of all methods, and the choice among them."""
    from palate.methods import METHODS

    return Plans(METHODS)


COMMAND = Group(
    name="plan",
    help="Show what a run will cost before it starts, or choose a method for what you have.",
    members=members,
    noun="method",
    title="Methods",
    listed_by="palate methods",
    usage="Usage: palate plan METHOD [OPTIONS], or palate plan --have prompts,judge [OPTIONS]",
    default=CHOICE,
    order=2,
)
