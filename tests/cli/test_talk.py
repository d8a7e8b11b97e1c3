from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.cli.commands.chat import ChatConfig
from palate.cli.speakers import Speaker
from palate.cli.talk import Chat
from palate.config import ModelConfig
from palate.errors import DataError
from palate.model import load_model
from palate.types import Completion

Said = str | BaseException | tuple[str, int]


class Fake(Speaker):
    """A speaker that says given things, or raises; a number with a text counts the turns forgotten."""

    def __init__(self, name: Any, codec: Any, *script: Said) -> None:
        super().__init__(name, f"{name} model", None, codec)  # type: ignore[arg-type]
        self.script = list(script)
        self.heard: list[tuple[str, str, float, int, int]] = []

    def answer(self, text: str, system: str, sampling: Any, seed: int) -> tuple[Completion, int]:
        self.heard.append((text, system, sampling.temperature, seed, len(self.turns)))
        said = self.script.pop(0)
        if isinstance(said, BaseException):
            raise said
        words, forgotten = said if isinstance(said, tuple) else (said, 0)
        self.turns.append((text, words))
        finish = "length" if words.endswith("...") else "eos"
        return Completion(words, (1, 2, 3), finish=finish), forgotten  # type: ignore[arg-type]


class Talk:
    """A chat of fake speakers, with what it shows."""

    def __init__(self, codec: Any, *scripts: list[Said], width: int | None = None, **options: Any) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.speakers = [
            Fake(name, codec, *script) for name, script in zip(("base", "checkpoint"), scripts, strict=False)
        ]
        console = Console(file=self.out, force_terminal=width is not None, width=width, no_color=True)
        notes = Console(file=self.err, width=200)
        options = {"interactive": width is not None} | options
        self.chat = Chat(list(self.speakers), ChatConfig(run=Path("run")), console, notes, **options)

    def take(self, *lines: str) -> list[bool]:
        return [self.chat.take(line) for line in lines]


@pytest.fixture(scope="module")
def codec(tiny: str) -> Any:
    return load_model(ModelConfig(model=tiny, device="cpu"), trainable=False).codec


# ---- Turns -----------------------------------------------------------------------------------------


def test_both_answer_one_below_the_other(codec: Any) -> None:
    talk = Talk(codec, ["one", "two..."], [" uno\n", ""])
    assert talk.take("hello", "  ", "and?\n") == [True] * 3
    assert talk.out.getvalue() == (
        "you  hello\nbase  one\ncheckpoint  uno\n"
        "you  and?\nbase  two... (truncated at 3 tokens)\ncheckpoint  (empty answer)\n"
    )
    assert talk.err.getvalue() == ""
    assert talk.speakers[0].heard == [("hello", "", 0.7, 0, 0), ("and?", "", 0.7, 0, 1)]


def test_side_by_side_where_there_is_room(codec: Any) -> None:
    wide, narrow = (Talk(codec, ["one"], ["uno"], width=width) for width in (100, 99))
    wide.take("hello")
    narrow.take("hello")
    assert [line.split() for line in wide.out.getvalue().splitlines() if line.strip()] == [
        ["base", "checkpoint"],
        ["one", "uno"],
    ]
    assert narrow.out.getvalue().split() == ["base", "one", "checkpoint", "uno"]


@pytest.mark.parametrize("width", [None, 90, 400])
def test_what_a_model_says_does_nothing_to_the_terminal(codec: Any, width: int | None) -> None:
    hostile = "a\x1b[2J\x1b]0;title\x07b\x9b31m\r\u202eback\u2066 [red]x[/red] [/nothing] :smile:"
    talk = Talk(codec, [hostile], [DataError(hostile)], width=width)
    talk.take("hi \x1b[2J[/b]")
    shown = talk.out.getvalue() + talk.err.getvalue()
    for style in ("\x1b[0m", "\x1b[1m", "\x1b[2m"):  # rich's own, without colour
        shown = shown.replace(style, "")
    assert not set(shown) & set("\x1b\x07\x9b\r\u202e\u2066")
    flat = " ".join(shown.split())
    assert flat.count("[red]x[/red] [/nothing] :smile:") == 2  # as it is, no markup


def test_one_speaker(codec: Any) -> None:
    talk = Talk(codec, ["one"], width=200)
    talk.take("hello")
    assert talk.out.getvalue().split() == ["base", "one"]


def test_the_oldest_turns_are_said_to_be_forgotten(codec: Any) -> None:
    talk = Talk(codec, [("one", 1), ("two", 2)], ["uno", "due"])
    talk.take("a", "b")
    assert talk.err.getvalue().splitlines() == [
        "base: the context is full, so the oldest turn is dropped",
        "base: the context is full, so the oldest 2 turns are dropped",
    ]


def test_a_turn_that_cannot_be_answered_ends_nothing(codec: Any) -> None:
    talk = Talk(codec, [DataError("this turn: too long"), "fine"], ["uno", "due"])
    assert talk.take("a", "b") == [True, True]
    assert talk.err.getvalue() == "base: this turn: too long\n"
    assert "base  (no answer)\ncheckpoint  uno\n" in talk.out.getvalue()
    assert talk.out.getvalue().endswith("base  fine\ncheckpoint  due\n")


def test_ctrl_c_stops_an_answer_and_no_more(codec: Any) -> None:
    talk = Talk(codec, [KeyboardInterrupt(), "fine"], ["uno", "due"], width=80)
    assert talk.take("a", "b") == [True, True]
    words = " ".join(talk.out.getvalue().replace("\x1b[2m", "").replace("\x1b[0m", "").split())
    assert words == "base (stopped; not part of the conversation) checkpoint uno base fine checkpoint due"
    assert [len(speaker.turns) for speaker in talk.speakers] == [1, 2]


def test_ctrl_c_ends_a_script(codec: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        Talk(codec, [KeyboardInterrupt()]).take("a")


# ---- Commands --------------------------------------------------------------------------------------


def test_commands_change_what_comes_next(codec: Any) -> None:
    talk = Talk(codec, ["one"] * 4)
    kept = talk.take("a", "/system  Be kind. ", "/temperature 0", "/seed 12", "b", "/reset", "/system", "c")
    assert kept == [True] * 8
    assert talk.speakers[0].heard == [
        ("a", "", 0.7, 0, 0),
        ("b", "Be kind.", 0.0, 12, 1),
        ("c", "", 0.0, 12, 0),
    ]
    assert talk.take("/quit") == [False]


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("/temperature hot", "temperature is 'hot', expected a number of at least 0"),
        ("/temperature -1", "temperature is -1, expected a number of at least 0"),
        ("/temperature nan", "temperature is nan, expected a finite number"),
        ("/temperature", "temperature is '', expected a number of at least 0"),
        ("/seed 1.5", "seed is 1.5, expected a whole number of at least 0"),
        (
            "/sede 1",
            "unknown command /sede; did you mean /seed? /help lists the commands, // starts a turn with /",
        ),
        ("/temp 1", "unknown command /temp; did you mean /temperature? /help lists the commands, // starts"),
        ("/zzz", "unknown command /zzz; /help lists the commands, // starts a turn with /"),
        ("/", "unknown command /; /help lists the commands, // starts a turn with /"),
        ("/help", "/temperature X"),
        ("/x\x1b[2J", "unknown command /x\N{REPLACEMENT CHARACTER}[2J;"),
    ],
)
def test_a_command_that_changes_nothing(codec: Any, line: str, note: str) -> None:
    talk = Talk(codec, ["one"])
    assert talk.take(line, "a") == [True, True]
    assert note in talk.err.getvalue()
    assert talk.speakers[0].heard == [("a", "", 0.7, 0, 0)]


def test_a_turn_may_begin_with_a_slash(codec: Any) -> None:
    talk = Talk(codec, ["one"])
    talk.take("//etc/passwd")
    assert talk.speakers[0].heard[0][0] == "/etc/passwd"


def test_the_greeting(codec: Any, tiny_plain: str) -> None:
    talk = Talk(codec, [], [], width=80)
    talk.chat.greet()
    assert "base model" in talk.out.getvalue()
    assert "checkpoint model" in talk.out.getvalue()
    assert "no chat template" not in talk.err.getvalue()
    talk.speakers[0].codec = load_model(ModelConfig(model=tiny_plain, device="cpu"), trainable=False).codec
    talk.chat.greet()
    assert "no chat template: the models continue your text" in talk.err.getvalue()
