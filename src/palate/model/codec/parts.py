"""Prompts and answers of one model in tokens, and small questions about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palate.model.codec.template import Rendering
from palate.types import Content, Finish, Message


@dataclass(frozen=True)
class Asked:
    """A prompt as sampling begins from it."""

    rendering: Rendering
    ids: tuple[int, ...]
    same_chars: int = 0
    same_tokens: int = 0
    """How many characters and tokens stay the same whatever follows: those before the last control token."""


@dataclass(frozen=True)
class Answered:
    """A prompt with an answer, as tokens; the answer begins at token `start`."""

    ids: tuple[int, ...]
    start: int
    text: str
    finish: Finish
    whole: Rendering
    """The finished conversation as text."""
    lead: int
    """How many tokens come before those of that text, such as a BOS."""


def turn_of(content: Content) -> Message:
    """The turn of the assistant that an answer is."""
    return {"role": "assistant", "content": content} if isinstance(content, str) else content[0]


def closing(opened: str) -> str:
    """What closes a thought that the template opens at the end of a prompt, as in `<think>`."""
    tag = opened.rstrip().rpartition("<")[2]
    return f"\n</{tag}\n\n" if tag.endswith(">") and tag[:-1].isalpha() else ""


def shared(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rows begin with."""
    pairs = zip(*rows, strict=False)
    return next((n for n, tokens in enumerate(pairs) if len(set(tokens)) > 1), min(map(len, rows)))
