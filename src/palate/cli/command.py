"""The records that declare a command or a group of commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

if TYPE_CHECKING:
    from palate.config import Config

Json = Annotated[
    bool, Parameter(negative=(), help="Print JSON and nothing else on stdout.", show_default=False)
]
"""The type of a command's parameter `json`."""


@dataclass(frozen=True)
class Command:
    """One command of the program, or one member of a `Group`.

    Attributes:
        name: the word to type; the name of the command's file, with dashes for underscores.
        help: one line.
        call: does the work and returns the exit code (None means 0). It takes the configuration; without
            `config`, its own parameters become the flags, as cyclopts reads them.
        config: the configuration class whose fields become flags, or a function that builds it; the command
            also gets `--config FILE`.
        choose: if `config` combines the fields of several classes, returns the class for the given values
            (by field name).
        first: the field whose value is the command's first word instead of a flag.
        usage: the first line of the help; a standard line if None.
        order: the command's position in the list of commands.
    """

    name: str
    help: str
    call: Callable[..., int | None]
    config: type[Config] | Callable[[], type[Config]] | None = None
    choose: Callable[[Mapping[str, Any]], type[Config]] | None = None
    first: str | None = None
    usage: str | None = None
    order: int = 0


@dataclass(frozen=True)
class Group:
    """A command with subcommands, such as `palate run METHOD`.

    Attributes:
        name, help, usage, order: as for `Command`.
        members: returns the subcommands by name. Listing the names must not import anything heavy.
        noun: the word for a subcommand in messages, such as "method".
        title: the heading above the subcommands in the help.
        listed_by: the command line that lists the subcommands.
        default: the subcommand that a flag right after the group's name belongs to; None if a subcommand
            must be named.
    """

    name: str
    help: str
    members: Callable[[], Mapping[str, Command]]
    noun: str
    title: str
    listed_by: str
    usage: str | None = None
    default: str | None = None
    order: int = 0


Commands = Mapping[str, Command | Group]
