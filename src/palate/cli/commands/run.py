"""`palate run METHOD`: train a model with a method, then show the results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from palate.cli.command import Command, Group
from palate.world import current
from palate.world.start import processes_around


def run(method: str, config: Any) -> int:
    """Train a model, then print the results; with `processes`, start them first."""
    if (config.processes or 1) > 1 and processes_around() == 1:
        from palate.world.launcher import launch

        return launch([sys.executable, "-m", "palate", *sys.argv[1:]], config.processes)
    from rich.console import Console

    from palate.cli.outcome import show_outcome
    from palate.launch import train
    from palate.quiet import quiet_libraries
    from palate.run import Display

    quiet_libraries()
    outcome = train(method, config, display=Display())
    if current().leads:
        show_outcome(outcome, Console())
    return 0


class Methods(Mapping[str, Command]):
    """The commands of all methods by name, each created on access.

    Args:
        methods: the methods by name; it imports a method's file on access.
    """

    def __init__(self, methods: Mapping[str, Any]) -> None:
        self._methods = methods

    def __getitem__(self, name: str) -> Command:
        """Return the command of a method."""
        method = self._methods[name]
        return Command(
            name,
            method.summary,
            partial(run, name),
            config=method.options,
            choose=method.choose,
        )

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the methods."""
        return iter(self._methods)

    def __len__(self) -> int:
        """Return the number of methods."""
        return len(self._methods)

    def __contains__(self, name: object) -> bool:
        """Return True for a method, without importing it."""
        return name in self._methods


def members() -> Methods:
    """Return the commands of all methods."""
    from palate.methods import METHODS

    return Methods(METHODS)


COMMAND = Group(
    name="run",
    help="Train a model with a method. `palate run METHOD --help` lists its options.",
    members=members,
    noun="method",
    title="Methods",
    listed_by="palate methods",
    usage="Usage: palate run METHOD [OPTIONS]",
)
