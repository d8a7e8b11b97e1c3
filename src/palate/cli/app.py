"""The program `palate`: its commands, and how a user's mistake ends: one sentence on stderr and exit code 2.

What a command needs, the methods and torch with them, is imported for that command alone, so that
`palate --version` and `palate --help` answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TextIO, cast

from cyclopts import App, CycloptsError, Parameter

from palate.cli.mistakes import explain
from palate.errors import ConfigError, PalateError

if TYPE_CHECKING:
    from palate.config import Config

MISTAKE, INTERRUPTED, CUT_OFF = 2, 130, 141
"""Exit codes: a user's mistake, Ctrl-C, and stdout closed by its reader (as shells count signals)."""

Json = Annotated[
    bool, Parameter(negative=(), help="Print JSON, and nothing else on stdout.", show_default=False)
]


class Method(Protocol):
    """What the command line needs of a training method."""

    @property
    def name(self) -> str:
        """METHOD in `palate run METHOD`."""

    @property
    def summary(self) -> str:
        """One line."""

    @property
    def options(self) -> type[Config]:
        """Its options, of all its ways."""

    def choose(self, values: Mapping[str, Any], /) -> type[Config]:
        """The class that values are for."""


class Actions(Protocol):
    """What the commands do: modules of `palate.cli`, or one stand-in for all of them."""

    @property
    def SampleConfig(self) -> type[Config]:  # noqa: N802 - a class in the module
        """Options of `palate sample`."""

    @property
    def ChatConfig(self) -> type[Config]:  # noqa: N802 - a class in the module
        """Options of `palate chat`."""

    def run(self, method: str, config: Any) -> int | None:
        """Train a model by `method`."""

    def chat(self, config: Any) -> int | None:
        """Talk to what a run has trained."""

    def sample(self, config: Any) -> int | None:
        """Sample completions."""

    def runs(self, directory: Path | None, *, json: bool) -> int | None:
        """List the runs in a directory."""

    def report(self, runs: Sequence[Path], *, output: Path | None, show: bool) -> int | None:
        """Write a report on runs."""

    def methods(self, json: bool) -> int | None:
        """Print the table of methods."""


def main(
    argv: Sequence[str] | None = None,
    *,
    methods: Mapping[str, Method] | None = None,
    actions: Actions | None = None,
) -> int:
    """Run the command line `argv`, which starts after the program's name, and return the exit code.

    `methods` and `actions` stand in for `palate.methods.METHODS` and for the modules that do the commands'
    work. An error that is no `PalateError` is a bug of ours and goes through with its traceback.
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
    _add_chat(app, actions, flags=command == "chat")
    _add_sample(app, actions, flags=command == "sample")
    _add_listings(app, actions)
    return app


def _add_methods(run: App, methods: Mapping[str, Method] | None, actions: Actions | None) -> None:
    from palate.cli.flags import command

    def start(name: str, config: Config) -> int | None:
        return _actions(actions).run(name, config)

    for name, method in _methods(methods).items():
        done = partial(start, name)
        action = command(method.options, done, name=name, help=method.summary, choose=method.choose)
        run.command(action, name=name)


def _add_chat(app: App, actions: Actions | None, *, flags: bool) -> None:
    about = "Talk to what a run has trained, beside the model that it started from."
    if not flags:
        app.command(App(name="chat", help=about, sort_key=1))
        return
    from palate.cli.flags import command

    done = _actions(actions, "chat")
    action = command(done.ChatConfig, done.chat, name="chat", help=about, first="run")
    app.command(action, name="chat", usage="Usage: palate chat RUN [OPTIONS]", sort_key=1)


def _add_sample(app: App, actions: Actions | None, *, flags: bool) -> None:
    about = "Sample completions from a model."
    if not flags:
        app.command(App(name="sample", help=about, sort_key=2))
        return
    from palate.cli.flags import command

    done = _actions(actions)
    app.command(command(done.SampleConfig, done.sample, name="sample", help=about), name="sample", sort_key=2)


def _add_listings(app: App, actions: Actions | None) -> None:
    """The commands that train and sample nothing; their few flags cost no imports."""

    def runs(
        directory: Annotated[
            Path | None, Parameter(help="Where to look; `runs` if not given.", show_default=False)
        ] = None,
        /,
        *,
        json: Json = False,
    ) -> int | None:
        return _actions(actions, "runs").runs(directory, json=json)

    def report(
        *run: Annotated[Path, Parameter(help="Directories of runs.", negative=())],
        output: Annotated[
            Path | None,
            Parameter(metavar="FILE", help="Where to write it; beside the (first) run if not given."),
        ] = None,
        show: Annotated[
            bool,
            Parameter(name="--open", negative=(), help="Open it in a browser.", show_default=False),
        ] = False,
    ) -> int | None:
        if not run:
            raise ConfigError("no run is given, write `palate report RUN`, as `palate report runs/oaif`")
        return _actions(actions, "report").report(run, output=output, show=show)

    def methods(*, json: Json = False) -> int | None:
        return _actions(actions, "methods").methods(json=json)

    about = "List runs: how far they are and what came of them."
    app.command(runs, help=about, usage="Usage: palate runs [DIRECTORY] [OPTIONS]", sort_key=3)
    about = "Write a report on one run, or on several side by side."
    app.command(report, help=about, usage="Usage: palate report RUN... [OPTIONS]", sort_key=4)
    app.command(methods, help="Show the methods and what each needs.", sort_key=5)


def _dispatch(tokens: list[str], methods: Mapping[str, Method] | None, actions: Actions | None) -> int:
    first = next((token for token in tokens if not token.startswith("-")), None)
    app = build_app(first, methods=methods, actions=actions)
    try:
        code = app(tokens, print_error=False, exit_on_error=False, result_action="return_value")
    except CycloptsError as error:
        commands = [name for name in app if not name.startswith("-")]
        raise ConfigError(explain(error, commands=commands, methods=lambda: _methods(methods))) from None
    return code or 0


def _methods(methods: Mapping[str, Method] | None) -> Mapping[str, Method]:
    if methods is None:
        from palate.methods import METHODS

        return METHODS
    return methods


def _actions(actions: Actions | None, module: str = "actions") -> Actions:
    """The stand-in, or the module of `palate.cli` that has what a command does."""
    return actions if actions is not None else cast("Actions", import_module(f"palate.cli.{module}"))


def _version() -> str:
    try:
        return metadata.version("palate")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


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
