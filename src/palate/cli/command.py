"""What a command declares of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from palate.config import Config

Json = Annotated[
    bool, Parameter(negative=(), help="Print JSON, and nothing else on stdout.", show_default=False)
]
"""Type of a command's parameter `json`."""


@dataclass(frozen=True)
class Command:
    """One command of the program, or one member of a `Group`.

    Attributes:
        name: as it is typed; that of its file, with dashes for underscores.
        help: one line.
        call: does the work and returns the exit code, None for 0. It takes the configuration; without one,
            its own parameters are the flags, as cyclopts reads them.
        config: the configuration class whose fields are the flags, with `--config FILE` besides.
        choose: gives the class that values of fields, by name, are for, where `config` has the fields of
            several classes together.
        first: the field that is given as the first word instead of by a flag.
        usage: the line that begins the help, where the standard one does not do.
        order: its place in the list of commands.
    """

    name: str
    help: str
    call: Callable[..., int | None]
    config: type[Config] | None = None
    choose: Callable[[Mapping[str, Any]], type[Config]] | None = None
    first: str | None = None
    usage: str | None = None
    order: int = 0


@dataclass(frozen=True)
class Group:
    """A command that has commands of its own, as `palate run METHOD`.

    Attributes:
        name, help, usage, order: as those of a `Command`.
        members: gives its commands by name. Asking for the names should import nothing heavy.
        noun: a member in messages, as "method".
        title: of the list of members in the help.
        listed_by: the command line that lists the members.
    """

    name: str
    help: str
    members: Callable[[], Mapping[str, Command]]
    noun: str
    title: str
    listed_by: str
    usage: str | None = None
    order: int = 0


Commands = Mapping[str, Command | Group]
