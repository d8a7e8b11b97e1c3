"""A conversation in the terminal with one or two models, and the sources of its turns."""

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
"""The terminal width, in columns, from which two answers are shown side by side."""

COMMANDS = ("system", "temperature", "seed", "reset", "help", "quit")
HELP = """\
/system TEXT    set the system prompt; without TEXT, remove it
/temperature X  set the temperature: 0 is greedy, 1 samples the model's own distribution
/seed N         set the random seed; the same seed gives the same answers
/reset          clear the conversation
/quit           leave the chat (as does Ctrl-D); Ctrl-C stops an answer
//...           send a turn that begins with a slash"""


class Chat:
    """A conversation with one or two models, shown in a terminal.

    Args:
        speakers: the models, in the order of their answers.
        config: sampling options and seed; chat commands change them.
        console: receives the turns and the answers.
        notes: receives all other messages.
        interactive: True if a person types the turns. If False, each turn is repeated in the output, and
            Ctrl-C ends the chat.
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
        """Print the models' names and how to get help."""
        for speaker in self.speakers:
            self._say(Text.assemble((f"{speaker.name}  ", "cyan"), plain(speaker.source)))
        if not all(speaker.codec.has_template for speaker in self.speakers):
            self.note("no chat template: the models continue your text instead of answering it")
        self.note("/help lists the commands; Ctrl-D leaves the chat")

    def note(self, text: str) -> None:
        """Print a message that is not an answer."""
        self._notes.print(Text(plain(text), style="dim"), soft_wrap=True)

    def take(self, line: str) -> bool:
        """Run a command or answer a turn. Return False if the chat should end."""
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
                self.note("the conversation is cleared")
            case "system":
                self.system = rest
                self.note("the system prompt is set" if rest else "the system prompt is removed")
            case "temperature" | "seed":
                self._set(name, rest)
            case _:
                begun = [known for known in COMMANDS if name and known.startswith(name)]
                meant = next(iter(begun), near(name, COMMANDS))
                guess = f"did you mean /{meant}? " if meant else ""
                self.note(
                    f"unknown command /{name}; {guess}/help lists the commands, // starts a turn with /"
                )
        return True

    def _set(self, name: str, value: str) -> None:
        now = self.config.model_dump() | {name: value}
        try:
            self.config = load_config(type(self.config), file=None, flags={}, base=now)
        except ConfigError as error:
            self.note(str(error))
        else:
            self.note(f"{name} is set to {value}")

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
        """Return a model's answer, or a note in its place if the model cannot answer."""
        activity = f"{speaker.name} is answering" + ("; Ctrl-C stops it" if self._interactive else "")
        try:
            with busy(self._notes, activity):
                sampling, seed = self.config.sampling, self.config.seed
                completion, dropped = speaker.answer(text, self.system, sampling, seed)
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            return Text("(stopped; not part of the conversation)", style="dim")
        except DataError as error:
            self.note(f"{speaker.name}: {error}")
            return Text("(no answer)", style="dim")
        if dropped:
            turns = "turn is" if dropped == 1 else f"{dropped} turns are"
            self.note(f"{speaker.name}: the context is full, so the oldest {turns} dropped")
        answer = plain(completion.text).strip()
        shown = Text(answer) if answer else Text("(empty answer)", style="dim")
        if completion.finish == "length":
            shown.append(f" (truncated at {len(completion.token_ids)} tokens)", style="dim")
        return shown

    def _say(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal)


def typed(note: Callable[[str], None]) -> Iterator[str]:
    """Yield the lines that a person types."""
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
            note("Ctrl-D or /quit leaves the chat")


def piped() -> Iterator[str]:
    """Yield the lines of the standard input; bytes that are not UTF-8 are replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin or ()


def busy(console: Console, activity: str) -> AbstractContextManager[object]:
    """Return a context that shows a spinner while it is open; it does nothing outside a terminal."""
    return console.status(Text(activity, style="dim")) if console.is_terminal else nullcontext()
