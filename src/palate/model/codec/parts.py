"""Prompts and answers of one model in tokens, and helpers for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from palate.model.codec.template import Rendering
from palate.types import Content, Finish, Message


@dataclass(frozen=True)
class Asked:
    """A prompt in the form in which sampling starts from it."""

    rendering: Rendering
    ids: tuple[int, ...]
    same_chars: int = 0
    same_tokens: int = 0
    """The characters and tokens before the last control token, which no later text can change."""


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
    """Return the answer as a turn of the assistant."""
    return {"role": "assistant", "content": content} if isinstance(content, str) else content[0]


def closing(opened: str) -> str:
    """Return the text that closes a thought opened at the end of a prompt, as in `<think>`."""
    tag = opened.rstrip().rpartition("<")[2]
    return f"\n</{tag}\n\n" if tag.endswith(">") and tag[:-1].isalpha() else ""


def shared(rows: Sequence[Sequence[int]]) -> int:
    """Return the number of first tokens that all rows share."""
    pairs = zip(*rows, strict=False)
    return next((n for n, tokens in enumerate(pairs) if len(set(tokens)) > 1), min(map(len, rows)))
