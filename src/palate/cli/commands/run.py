"""`palate run METHOD`: train by a method, then show what has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from palate.cli.command import Command, Group


def run(method: str, config: Any) -> int:
    """Train, then show what changed."""
    from rich.console import Console

    from palate.cli.outcome import show_outcome
    from palate.launch import train
    from palate.quiet import quiet_libraries
    from palate.run import Display

    quiet_libraries()
    show_outcome(train(method, config, display=Display()), Console())
    return 0


class Methods(Mapping[str, Command]):
    """A command for each method, made when it is asked for.

    Args:
        methods: by name; it imports one where it is asked for.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self._methods = methods

    def __getitem__(self, name: str) -> Command:
        """The command of a method."""
        method = self._methods[name]
        return Command(
            name,
            method.summary,
            partial(run, name),
            config=method.options,
            choose=method.choose,
        )

    def __iter__(self) -> Iterator[str]:
        """The names of the methods."""
        return iter(self._methods)

    def __len__(self) -> int:
        """The number of methods."""
        return len(self._methods)

    def __contains__(self, name: object) -> bool:
        """Return True for a method, without importing it."""
        return name in self._methods


def members() -> Methods:
    """The commands of all methods."""
    from palate.methods import METHODS

    return Methods(METHODS)


COMMAND = Group(
    name="run",
    help="Train a model by a method. `palate run METHOD --help` explains its options.",
    members=members,
    noun="method",
    title="Methods",
    listed_by="palate methods",
    usage="Usage: palate run METHOD [OPTIONS]",
)
