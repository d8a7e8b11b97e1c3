"""Prompts and answers of one model in tokens, and helpers for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from palate.model.codec.finished import Finished
from palate.model.codec.template import ChatTemplate, Refused, Rendering
from palate.types import Content, Finish, Message


@dataclass(frozen=True)
class Asked:
    """A prompt in the form in which sampling starts from it."""

    rendering: Rendering
    ids: tuple[int, ...]
    same_tokens: int = 0
    """The tokens before the last control token, which no later text can change."""


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
    first = min(rows, key=len)
    low, high = 0, len(first)
    while low < high:  # by bisection: slices are compared faster than tokens
        middle = (low + high + 1) // 2
        if all(row[low:middle] == first[low:middle] for row in rows):
            low = middle
        else:
            high = middle - 1
    return low


def other_start(opened: Asked, finished: Finished, notes: Collection[str]) -> str:
    """Return the note on an answer that does not follow the start of sampling: the known one, if any."""
    key = "answers are learnt as the chat template renders them, which differs from the start of sampling"
    known = next((note for note in notes if note.startswith(key)), None)
    sampled, learnt = opened.rendering.text[-24:], finished.text[max(0, finished.start - 12) :][:36]
    return known or f"{key}: sampling follows {sampled!r}, the rendering has {learnt!r}"


def opening_of(template: ChatTemplate, control: re.Pattern[str]) -> str:
    """Return the text that the template puts before an answer, if it has control tokens."""
    turn = {"role": "user", "content": "?"}
    try:
        closed, opened = (template.text([turn], {}, ask=ask) for ask in (False, True))
    except Refused:
        return ""
    opening = opened.removeprefix(closed).strip() if opened.startswith(closed) else ""
    return opening if control.search(opening) else ""
