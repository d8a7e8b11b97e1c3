"""The program `palate`: its commands, and how a user's mistake ends: one sentence on stderr and exit code 2.

The methods, and torch with them, are imported for `palate run` and `palate methods` alone, so that
`palate --version` and `palate --help` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO

from cyclopts import (
    App,
    CoercionError,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from palate.errors import ConfigError, PalateError

if TYPE_CHECKING:
    from cyclopts import Argument

    from palate.config import Config

MISTAKE, INTERRUPTED, CUT_OFF = 2, 130, 141
"""Exit codes: a user's mistake, Ctrl-C, and stdout closed by its reader (as shells count signals)."""


class Method(Protocol):
    """What the command line needs of a training method."""

    @property
    def name(self) -> str:
        """METHOD in `palate run METHOD`."""

    @property
    def summary(self) -> str:
        """One line."""

    @property
    def config(self) -> type[Config]:
        """Its options."""


class Actions(Protocol):
    """What the commands do: the module `palate.cli.actions`, or a stand-in for it."""

    @property
    def SampleConfig(self) -> type[Config]:  # noqa: N802 - a class in the module
        """Options of `palate sample`."""

    def run(self, method: str, config: Any) -> int | None:
        """Train a model by `method`."""

    def sample(self, config: Any) -> int | None:
        """Sample completions."""

    def methods(self, json: bool) -> int | None:
        """Print the table of methods."""


def main(
    argv: Sequence[str] | None = None,
    *,
    methods: Mapping[str, Method] | None = None,
    actions: Actions | None = None,
) -> int:
    """Run the command line `argv`, which starts after the program's name, and return the exit code.

    `methods` and `actions` stand in for `palate.methods.METHODS` and `palate.cli.actions`. An error that is
    no `PalateError` is a bug of ours and goes through with its traceback.
    """
    tokens = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(tokens, methods, actions)
        sys.stdout.flush()
    except PalateError as error:
        _complain(str(error))
        return MISTAKE
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        if not _let_go(sys.stdout):
            raise
        return CUT_OFF
    return code


def build_app(
    command: str | None = None,
    *,
    methods: Mapping[str, Method] | None = None,
    actions: Actions | None = None,
) -> App:
    """The commands. Only `command`, the first word of the command line, is given its flags.

    The flags of the others are not needed to tell what they are, and would cost their imports.
    """
    app = App(
        name="palate",
        help="Align language models with preferences: every method, one roof, any causal LM.",
        version=f"palate {_version()}",
        help_format="plaintext",
        suppress_keyboard_interrupt=False,
    )
    run = App(
        name="run",
        help="Train a model by a method. `palate run METHOD --help` explains its options.",
        usage="Usage: palate run METHOD [OPTIONS]",
        group_commands="Methods",
        sort_key=0,
    )
    app.command(run)
    if command == "run":
        _add_methods(run, methods, actions)
    _add_sample(app, actions, flags=command == "sample")

    def show_methods(
        *,
        json: Annotated[
            bool, Parameter(negative=(), help="Print JSON, and nothing else on stdout.", show_default=False)
        ] = False,
    ) -> int | None:
        return _actions(actions).methods(json=json)

    app.command(show_methods, name="methods", help="Show the methods and what each needs.", sort_key=2)
    return app


def _add_methods(run: App, methods: Mapping[str, Method] | None, actions: Actions | None) -> None:
    from palate.cli.flags import command

    def start(name: str, config: Config) -> int | None:
        return _actions(actions).run(name, config)

    for name, method in _methods(methods).items():
        action = command(method.config, partial(start, name), name=name, help=method.summary)
        run.command(action, name=name)


def _add_sample(app: App, actions: Actions | None, *, flags: bool) -> None:
    about = "Sample completions from a model."
    if not flags:
        app.command(App(name="sample", help=about, sort_key=1))
        return
    from palate.cli.flags import command

    done = _actions(actions)
    app.command(command(done.SampleConfig, done.sample, name="sample", help=about), name="sample", sort_key=1)


def _dispatch(tokens: list[str], methods: Mapping[str, Method] | None, actions: Actions | None) -> int:
    first = next((token for token in tokens if not token.startswith("-")), None)
    app = build_app(first, methods=methods, actions=actions)
    try:
        code = app(tokens, print_error=False, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        raise ConfigError(explain(error, methods)) from None
    return code or 0


def _methods(methods: Mapping[str, Method] | None) -> Mapping[str, Method]:
    if methods is None:
        from palate.methods import METHODS

        return METHODS
    return methods


def _actions(actions: Actions | None) -> Actions:
    if actions is None:
        from palate.cli import actions as ours

        return ours
    return actions


def _version() -> str:
    try:
        return metadata.version("palate")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


# Mistakes


def explain(error: CycloptsError, methods: Mapping[str, Method] | None = None) -> str:
    """What is wrong with a command line, in one sentence of ours."""
    path = " ".join(["palate", *(error.command_chain or ())])
    match error:
        case UnknownCommandError(unused_tokens=[word, *_]):
            return _unknown_command(word, path, methods)
        case UnknownOptionError():
            flag = error.token.keyword or error.token.value
            flags = {name: name for argument in error.argument_collection for name in argument.names}
            return f"unknown flag {flag};{_perhaps(flag, flags)} `{path} --help` lists them"
        case UnusedCliTokensError(unused_tokens=[word, *_]):
            return _unexpected(word, path, error)
        case MissingArgumentError():
            return _no_value(error)
        case RepeatArgumentError():
            given = _argument(error.token.keyword, error)
            names = given.names if given is not None and given.is_flag() else [error.token.keyword]
            return f"{' or '.join(map(str, names))} is given more than once, keep one"
        case CoercionError() if error.token is not None:
            return f"{error.token.keyword} is {error.token.value!r}, expected no value, or true or false"
        case _:
            return str(error)


def _unknown_command(word: str, path: str, methods: Mapping[str, Method] | None) -> str:
    if path == "palate run":
        if word.startswith("-"):
            return f"expected a method right after `palate run`, got {word}; `palate methods` lists them"
        advice = _perhaps(word, {name: repr(name) for name in _methods(methods)})
        return f"unknown method {word!r};{advice} `palate methods` lists them"
    if word.startswith("-"):
        return f"expected a command right after `palate`, got {word}; `palate --help` lists them"
    commands = {name: repr(name) for name in ("run", "sample", "methods")}
    commands |= {name: f"`palate run {name}`" for name in _methods(methods)}
    return f"unknown command {word!r};{_perhaps(word, commands)} `palate --help` lists them"


def _perhaps(word: str, meanings: Mapping[str, str]) -> str:
    from palate.cli.settings import near

    meant = near(word, meanings)
    return f" did you mean {meanings[meant]}?" if meant is not None else ""


def _unexpected(word: str, path: str, error: CycloptsError) -> str:
    before = _beside(word, error, -1)
    switch = _argument(before, error)
    if switch is not None and switch.is_flag():
        return f"unexpected {word!r}: {before} takes no value, write {' or '.join(switch.names)}"
    return f"unexpected {word!r}: a value follows its flag, and `{path} --help` lists the flags"


def _no_value(error: MissingArgumentError) -> str:
    assert error.argument is not None
    flag = error.keyword or error.argument.name
    value = _beside(flag, error, +1)
    joined = f"; a value that starts with a dash is joined, as `{flag}={value}`"
    advice = joined if value is not None and _argument(value, error) is None else ""
    return f"{flag} has no value, expected `{flag} {error.argument.parameter.metavar}`{advice}"


def _beside(token: str, error: CycloptsError, offset: int) -> str | None:
    """The token next to the first `token` of the command line."""
    tokens = error.root_input_tokens or []
    position = tokens.index(token) + offset if token in tokens else -1
    return tokens[position] if 0 <= position < len(tokens) else None


def _argument(flag: str | None, error: CycloptsError) -> Argument | None:
    """What the failed command knows by this flag."""
    known = error.app.assemble_argument_collection() if error.app and error.app.default_command else ()
    return next((argument for argument in known if flag in argument.names), None)


# Endings


def _complain(text: str) -> None:
    """One line on stderr, however long."""
    line = " ".join(part.strip() for part in text.splitlines())
    # A message may quote a model's text, which must not recolour the terminal or move its cursor.
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
    if not sys.stderr.isatty():
        print(f"palate: {line}", file=sys.stderr)
        return
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("palate:", "bold red"), f" {line}"), soft_wrap=True)


def _let_go(stream: TextIO) -> bool:
    """Whether the reader of `stream` is gone; if so, Python's flush at exit goes nowhere and stays silent.

    A broken pipe may be a socket's as well, which is no ending but an error.
    """
    try:
        print(file=stream, flush=True)  # only writing tells; a flush alone has nothing left to write
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return True
    return False
