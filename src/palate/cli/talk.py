"""A conversation in the terminal with one or two models, and where its turns come from."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from palate.cli.speakers import Speaker
from palate.errors import ConfigError, DataError
from palate.near import near
from palate.run.display import plain
from palate.settings import load_config

if TYPE_CHECKING:
    from palate.cli.commands.chat import ChatConfig

WIDE = 100
"""Columns of a terminal from which on two answers stand side by side."""

COMMANDS = ("system", "temperature", "seed", "reset", "help", "quit")
HELP = """\
/system TEXT    what the models are told before the conversation; alone, nothing
/temperature X  from 0 (the likeliest words) to 1 (the model as it is) and above
/seed N         other draws; with the same ones, a conversation gives the same answers
/reset          forget the conversation
/quit           end, as Ctrl-D does; Ctrl-C stops an answer
//...           a turn that begins with a slash"""


class Chat:
    """A conversation with one or two models, shown in a terminal.

    Args:
        speakers: who answers, in the order in which they are shown.
        config: sampling options and seed; commands change them.
        console: for what is said.
        notes: for everything else.
        interactive: whether a person is typing; if not, what was said is repeated and Ctrl-C ends it all.
    """

    def __init__(
        self,
        speakers: list[Speaker],
        config: ChatConfig,
        console: Console,
        notes: Console,
        *,
        interactive: bool,
    ) -> None:
        self.speakers = speakers
        self.config = config
        self.system = ""
        self._console, self._notes, self._interactive = console, notes, interactive

    def greet(self) -> None:
        """Who is there, and what can be typed."""
        for speaker in self.speakers:
            self._say(Text.assemble((f"{speaker.name}  ", "cyan"), plain(speaker.source)))
        if not all(speaker.codec.has_template for speaker in self.speakers):
            self.note("there is no chat template: the models go on with your text instead of answering it")
        self.note("/help lists what can be typed besides text; Ctrl-D ends")

    def note(self, text: str) -> None:
        """A line that is nobody's answer."""
        self._notes.print(Text(plain(text), style="dim"), soft_wrap=True)

    def take(self, line: str) -> bool:
        """Do what a line says: a command, or a turn to answer. False if the conversation is to end."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, rest = text[1:].partition(" ")
            return self._command(name, rest.strip())
        if text:
            self._turn(text.removeprefix("/") if text.startswith("//") else text)
        return True

    # -- inside ------------------------------------------------------------------------------------

    def _command(self, name: str, rest: str) -> bool:
        match name:
            case "quit":
                return False
            case "help":
                self.note(HELP)
            case "reset":
                for speaker in self.speakers:
                    speaker.turns.clear()
                self.note("the conversation is forgotten")
            case "system":
                self.system = rest
                self.note("the models are told that from now on" if rest else "the models are told nothing")
            case "temperature" | "seed":
                self._set(name, rest)
            case _:
                begun = [known for known in COMMANDS if name and known.startswith(name)]
                meant = next(iter(begun), near(name, COMMANDS))
                perhaps = f"did you mean /{meant}? " if meant else ""
                self.note(f"unknown command /{name}; {perhaps}/help lists them, // begins a turn with /")
        return True

    def _set(self, name: str, value: str) -> None:
        now = self.config.model_dump() | {name: value}
        try:
            self.config = load_config(type(self.config), file=None, flags={}, base=now)
        except ConfigError as error:
            self.note(str(error))
        else:
            self.note(f"{name} is {value} from now on")

    def _turn(self, text: str) -> None:
        if not self._interactive:
            self._say(Text.assemble(("you  ", "cyan"), plain(text)))
        beside = len(self.speakers) > 1 and self._console.is_terminal and self._console.width >= WIDE
        answers = []
        for speaker in self.speakers:
            answers.append(self._answer(speaker, text))
            if not beside:
                self._say(Text.assemble((f"{speaker.name}  ", "cyan"), answers[-1]))
        if beside:
            table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan")
            for speaker in self.speakers:
                table.add_column(speaker.name, ratio=1, overflow="fold")
            table.add_row(*answers)
            self._console.print(table)

    def _answer(self, speaker: Speaker, text: str) -> Text:
        """What a model says, or why it does not."""
        what = f"{speaker.name} answers" + ("; Ctrl-C stops it" if self._interactive else "")
        try:
            with busy(self._notes, what):
                sampling, seed = self.config.sampling, self.config.seed
                completion, forgotten = speaker.answer(text, self.system, sampling, seed)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            return Text("(stopped; not part of the conversation)", style="dim")
        except DataError as error:
            self.note(f"{speaker.name}: {error}")
            return Text("(no answer)", style="dim")
        if forgotten:
            turns = "turn is" if forgotten == 1 else f"{forgotten} turns are"
            self.note(f"{speaker.name}: the context is full, so the oldest {turns} forgotten")
        said = plain(completion.text).strip()
        shown = Text(said) if said else Text("(nothing)", style="dim")
        if completion.finish == "length":
            shown.append(f" (cut at {len(completion.token_ids)} tokens)", style="dim")
        return shown

    def _say(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal)


def typed(note: Callable[[str], None]) -> Iterator[str]:
    """Lines that a person types."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and the arrow keys
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /quit ends")


def piped() -> Iterator[str]:
    """Lines of the standard input; what is no UTF-8 in them is replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin or ()


def busy(console: Console, what: str) -> AbstractContextManager[object]:
    """A spinner where somebody can see it."""
    return console.status(Text(what, style="dim")) if console.is_terminal else nullcontext()
