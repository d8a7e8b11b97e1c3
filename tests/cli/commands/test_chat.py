from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from palate.cli import main

Program = Callable[..., tuple[str, str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Program:
    """`palate chat` with turns piped in; its output and what it says besides."""

    def run(run: Path, *flags: str, turns: bytes = b"hi\nthere\n") -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(turns), encoding="utf-8"))
        assert main(["chat", str(run), "--max-new-tokens", "5", *flags]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


@pytest.mark.parametrize("lora", [True, False])
def test_piped_turns(make_run: Callable[..., Path], program: Program, lora: bool) -> None:
    run = make_run(lora=lora)
    out, err = program(run)
    assert err == ""
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith(("you", "base", "chec"))] == [
        "you", "base", "checkpoint", "you", "base", "checkpoint",
    ]  # fmt: skip
    assert program(run) == (out, "")
    assert program(run, "--seed", "5")[0] != out


def test_only_one_of_them(make_run: Callable[..., Path], program: Program) -> None:
    run = make_run(steps=(1, 2))
    both, one = (program(run, *flags)[0] for flags in ((), ("--only", "base")))
    assert "checkpoint  " in both
    assert "checkpoint  " not in one
    first, last = (program(run, "--only", "checkpoint", "--step", step)[0] for step in "12")
    assert "base  " not in first
    assert first != last


def test_input_that_is_no_text(make_run: Callable[..., Path], program: Program) -> None:
    out, _ = program(make_run(), turns=b"caf\xe9 \x00\xff\n/quit\nnot asked any more\n")
    assert "you  caf\N{REPLACEMENT CHARACTER} " in out
    assert "not asked" not in out


def test_no_input(make_run: Callable[..., Path], program: Program) -> None:
    assert program(make_run(), turns=b"") == ("", "")
    assert program(make_run(), turns=b"\n \n") == ("", "")


def test_a_conversation_longer_than_the_context(make_run: Callable[..., Path], program: Program) -> None:
    # The tiny model takes 256 tokens, one a byte.
    turns = b"\n".join([b"x" * 110, b"y" * 110, b"z" * 300, b"end"])
    out, err = program(make_run(), turns=turns)
    assert "base: the context is full, so the oldest turn is dropped\n" in err
    assert "checkpoint: the context is full, so the oldest turn is dropped\n" in err
    assert "base: this turn: the prompt has " in err
    assert out.count("(no answer)") == 2
    assert out.split("you  end")[1].count("(no answer)") == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_person_types(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed: list[str | BaseException] = ["/temperature 0", KeyboardInterrupt(), "hi", EOFError()]

    def read(prompt: str) -> str:
        assert prompt == "> "
        found = typed.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    assert main(["chat", str(make_run()), "--max-new-tokens", "3"]) == 0
    assert typed == []
    assert "step-3" in screen.getvalue().replace("\n", "")  # a long path is wrapped
    assert "you  " not in screen.getvalue()  # it is there already, typed
    err = capsys.readouterr().err
    assert "Ctrl-D or /quit leaves the chat" in err
    assert "temperature is set to 0" in err
