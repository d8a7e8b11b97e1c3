"""The program `palate`: parse the command line, run a command and return an exit code.

A user's mistake is reported in one sentence on stderr, with exit code 2. Only the named command is imported,
and for `palate run METHOD` only that method, so that help and error messages appear at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from cyclopts import App, CycloptsError

from palate.cli.command import Command, Commands, Group
from palate.cli.commands import COMMANDS
from palate.cli.mistakes import explain
from palate.errors import BudgetError, ConfigError, PalateError
from palate.world import Alone, current

MISTAKE, INTERRUPTED, CUT_OFF = 2, 130, 141
"""Exit codes: a user's mistake; Ctrl-C or a spending limit; stdout closed by its reader (128 + signal)."""

_UNUSED: Any = object()
"""A placeholder for cyclopts' error console, which would load rich; Palate prints errors itself."""

HELP = {"--help", "-h"}

GARBAGE = 10_000
"""New objects between two searches for garbage. Libraries make a million objects and no garbage, and with
Python's 700 it takes a seventh longer to load torch and transformers."""


def main(argv: Sequence[str] | None = None, *, commands: Commands = COMMANDS) -> int:
    """Run the command line `argv`, without the program's name, and return the exit code.

    Any exception other than `PalateError` is a bug in Palate and keeps its traceback.
    """
    gc.set_threshold(GARBAGE, *gc.get_threshold()[1:])
    tokens = list(sys.argv[1:] if argv is None else argv)
    code = _run(tokens, commands)
    if not isinstance(current(), Alone):  # a connection that waits for a dead process would delay the exit
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(tokens: list[str], commands: Commands) -> int:
    try:
        code = _dispatch(tokens, commands)
        sys.stdout.flush()
    except BudgetError as error:
        _complain(str(error))
        return INTERRUPTED
    except PalateError as error:
        _complain(str(error))
        return MISTAKE
    except SystemExit as ended:  # another process reports the error
        return ended.code if isinstance(ended.code, int) else 0
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not _let_go(sys.stdout):
            raise
        return CUT_OFF
    return code


def build_app(tokens: Sequence[str], commands: Commands = COMMANDS) -> App:
    """Return the program with the commands that the command line `tokens` needs.

    If `tokens` names a command, build that command with its flags. To list the commands, build each with its
    line of help. To report an unknown command, build the names only.
    """
    app = App(
        name="palate",
        help="Train language models on preferences with many methods. Works with any causal language model.",
        version=_version,
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    words = [token for token in tokens if not token.startswith("-")]
    named = _named(words, commands, listed=not tokens or (not words and not HELP.isdisjoint(tokens)))
    for name, command in named.items():
        if isinstance(command, Group):
            app.command(_group(command, tokens, words))
        elif command is None or not words:
            app.command(_line(name, command))
        else:
            _add(app, command)
    return app


def _named(words: Sequence[str], commands: Commands, *, listed: bool) -> dict[str, Command | Group | None]:
    """Return the commands to build by name: the first of `words`, or all; None if only the name is needed."""
    if words and words[0] in commands:
        return {words[0]: commands[words[0]]}
    return {name: commands[name] if listed else None for name in commands}


def _group(group: Group, tokens: Sequence[str], words: Sequence[str]) -> App:
    app = _line(group.name, group, usage=group.usage, group_commands=group.title)
    if not words:
        return app
    members, rest = group.members(), words[1:]
    listed = len(tokens) == 1 or (not rest and not HELP.isdisjoint(tokens))
    for name, member in _named(rest, members, listed=listed).items():
        if isinstance(member, Command) and rest:
            _add(app, member)
        else:
            app.command(_line(name, member))
    return app


def _line(name: str, command: Command | Group | None, **options: Any) -> App:
    """Return a command without its flags, for a list of commands."""
    if command is None:
        return App(name=name)
    return App(name=name, help=command.help, sort_key=command.order, **options)


def _add(app: App, command: Command) -> None:
    """Add a command with its flags."""
    options: dict[str, Any] = {"name": command.name, "usage": command.usage, "help": command.help}
    if command.config is None:
        app.command(command.call, **options)
        return
    from palate.cli.flags import command as with_flags

    action = with_flags(
        command.config if isinstance(command.config, type) else command.config(),
        command.call,
        name=command.name,
        help=command.help,
        first=command.first,
        choose=command.choose,
    )
    app.command(action, **options)


def _dispatch(tokens: list[str], commands: Commands) -> int:
    tokens = _with_default(tokens, commands)
    try:
        app = build_app(tokens, commands)
        code = app(
            tokens,
            print_error=False,
            exit_on_error=False,
            error_console=_UNUSED,
            result_action="return_value",
        )
    except CycloptsError as error:
        raise ConfigError(explain(error, commands)) from None
    return code or 0


def _with_default(tokens: list[str], commands: Commands) -> list[str]:
    """Name the default subcommand of a group in a command line that has a flag in its place."""
    group = commands.get(tokens[0]) if tokens and tokens[0] in commands else None
    if not isinstance(group, Group) or group.default is None or len(tokens) == 1:
        return tokens
    return (
        [tokens[0], group.default, *tokens[1:]]
        if tokens[1].startswith("-") and tokens[1] not in HELP
        else tokens
    )


def _version() -> str:
    from importlib import metadata

    try:
        return f"palate {metadata.version('palate')}"
    except metadata.PackageNotFoundError:
        return "palate (run from its source, not installed)"


# Endings


def _complain(text: str) -> None:
    """Print one line on stderr, however long."""
    line = " ".join(part.strip() for part in text.splitlines())
    # A message may quote a model's text, which must not change the terminal's colours or move its cursor.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    if not sys.stderr.isatty():
        print(f"palate: {line}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("palate:", "bold red"), f" {line}"), soft_wrap=True)


def _let_go(stream: TextIO) -> bool:
    """Return True if the reader of `stream` has closed it, and silence Python's flush at exit.

    A BrokenPipeError can also come from a socket; then the result is False and the error is raised.
    """
    try:
        print(file=stream, flush=True)  # the buffer is empty by now, so a flush alone would not fail
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False
