"""Error messages for invalid command lines: cyclopts' errors in one plain sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cyclopts import (
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from palate.cli.command import Commands, Group
from palate.near import near, setting_near

if TYPE_CHECKING:
    from cyclopts import Argument

GROUPS = ("run",)
"""Groups whose subcommands users may type without the group's name."""


def explain(error: CycloptsError, commands: Commands) -> str:
    """Return one sentence about the mistake that cyclopts found in a command line.

    Args:
        error: the error raised by cyclopts.
        commands: the program's commands, used to suggest the intended one.
    """
    path = " ".join(["palate", *(error.command_chain or ())])
    match error:
        case UnknownCommandError(unused_tokens=[word, *_]):
            return _unknown_command(word, path, commands)
        case UnknownOptionError():
            flag = error.token.keyword or error.token.value
            flags = [name for argument in error.argument_collection for name in argument.names]
            return f"unknown flag {flag};{_perhaps_flag(flag, flags)} `{path} --help` lists the flags"
        case UnusedCliTokensError(unused_tokens=[word, *_]):
            return _unexpected(word, path, error)
        case MissingArgumentError():
            return _no_value(error)
        case RepeatArgumentError():
            given = _argument(error.token.keyword, error)
            names = given.names if given is not None and given.is_flag() else [error.token.keyword]
            return f"{' or '.join(map(str, names))} is given more than once; keep one"
        case CoercionError() if error.token is not None:
            return f"{error.token.keyword} is {error.token.value!r}, expected {_wanted(error)}"
        case _:
            return str(error)


def _unknown_command(word: str, path: str, commands: Commands) -> str:
    _, *names = path.split()
    group = commands[names[0]] if names else None
    if isinstance(group, Group):
        if word.startswith("-"):
            return (
                f"expected a {group.noun} right after `{path}`, got {word}; "
                f"`{group.listed_by}` lists the {_plural(group.noun)}"
            )
        advice = _perhaps(word, {name: repr(name) for name in group.members()})
        return f"unknown {group.noun} {word!r};{advice} `{group.listed_by}` lists the {_plural(group.noun)}"
    if word.startswith("-"):
        return f"expected a command right after `palate`, got {word}; `palate --help` lists the commands"
    groups = [group for name in GROUPS if isinstance(group := commands.get(name), Group)]
    meanings = {name: f"`palate {g.name} {name}`" for g in groups for name in g.members()}
    meanings |= {name: repr(name) for name in commands}
    return f"unknown command {word!r};{_perhaps(word, meanings)} `palate --help` lists the commands"


def _plural(noun: str) -> str:
    """Return the plural of `method`, or of `kind of data`."""
    first, space, rest = noun.partition(" ")
    return f"{first}s{space}{rest}"


def _perhaps(word: str, meanings: Mapping[str, str]) -> str:
    meant = near(word, meanings)
    return f" did you mean {meanings[meant]}?" if meant is not None else ""


def _perhaps_flag(flag: str, flags: Iterable[str]) -> str:
    """Return a suggestion for an unknown flag, which may be that of another trainer."""
    settings = {name.lstrip("-").replace("-", "_"): name for name in flags}
    meant = setting_near(flag, settings)
    return f" did you mean {settings[meant]}?" if meant is not None else ""


def _wanted(error: CoercionError) -> str:
    """Return the values that a flag takes, in words."""
    choices = error.argument.get_choices(force=True) if error.argument is not None else None
    if choices:
        return f"one of {', '.join(choices)}"
    numbers = {int: "a whole number", float: "a number"}
    return numbers.get(error.target_type or bool, "no value, or true or false")


def _unexpected(word: str, path: str, error: CycloptsError) -> str:
    before = _beside(word, error, -1)
    switch = _argument(before, error)
    if switch is not None and switch.is_flag():
        return f"unexpected {word!r}: {before} takes no value; write {' or '.join(switch.names)}"
    example = f", such as `--data {word}`" if _argument("--data", error) is not None else ""
    return f"unexpected {word!r}: a value must follow its flag{example}; `{path} --help` lists the flags"


def _no_value(error: MissingArgumentError) -> str:
    assert error.argument is not None
    flag = error.keyword or error.argument.name
    value = _beside(flag, error, +1)
    joined = f"; if the value starts with a dash, write `{flag}={value}`"
    advice = joined if value is not None and _argument(value, error) is None else ""
    return f"{flag} has no value, expected `{flag} {error.argument.parameter.metavar}`{advice}"


def _beside(token: str, error: CycloptsError, offset: int) -> str | None:
    """Return the token `offset` places from the first `token` of the command line; None if there is none."""
    tokens = error.root_input_tokens or []
    position = tokens.index(token) + offset if token in tokens else -1
    return tokens[position] if 0 <= position < len(tokens) else None


def _argument(flag: str | None, error: CycloptsError) -> Argument | None:
    """Return the failed command's argument with this flag; None if there is none."""
    known = error.app.assemble_argument_collection() if error.app and error.app.default_command else ()
    return next((argument for argument in known if flag in argument.names), None)
