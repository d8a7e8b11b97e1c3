"""Where the answer stands in a conversation that the chat template has rendered with it.

The template decides what comes before an answer, what it makes of it and what it puts behind it. So nothing
here puts an answer together: the finished conversation is rendered as a whole, and the answer is looked up in
it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.model.codec.template import ChatTemplate, Refused, Rendering, Span
from palate.types import Message, said

_HERE = "\ue0f0palate\ue0f1"
"""Stands for an answer in renderings that are looked at, never learnt."""


@dataclass(frozen=True)
class Finished:
    """A rendered conversation with its answer."""

    text: str
    typed: tuple[Span, ...]
    """Parts that look like control tokens, but were typed by somebody else than the assistant."""
    start: int
    """Where the answer begins."""
    close: int
    """Where its words end."""
    stop: int
    """Behind the token that the template closes it with, or `close` if it writes none."""
    continues: bool = True
    """Whether the answer begins where sampling does."""


class Finisher:
    """Renders conversations with their answers, and finds the answers in them."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self.template = template
        self._control = control
        self.tail = self._ending()
        self._stop = 0

    def open(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> Rendering:
        """Render what an answer is to follow; a begun turn of the assistant stays open.

        Raises:
            Refused: the template does not take these turns.
        """
        if not turns or turns[-1]["role"] != "assistant":
            return self.template.render(turns, variables, ask=True)
        begun = self._begun(turns, variables)
        rendering = self.template.render(turns, variables, ask=False)
        if rendering.text.startswith(begun):
            return Rendering(begun, tuple(span for span in rendering.typed if span[1] <= len(begun)))
        return Rendering(begun)

    def finish(
        self, turns: Sequence[Message], answer: Message, variables: Mapping[str, Any], asked: str
    ) -> Finished:
        """Render the turns with their answer.

        Args:
            turns: what is answered.
            answer: the assistant's turn.
            variables: what the template gets beside the turns.
            asked: the text of `open` for the same turns.

        Raises:
            Refused: the template does not take this conversation.
        """
        if turns and turns[-1]["role"] == "assistant":
            return self._continued(turns, answer, variables)
        whole = self.template.render([*turns, answer], variables, ask=False)
        continues = whole.text.startswith(asked)
        start = len(asked) if continues else self._start(turns, answer, variables, asked, whole.text)
        return self._closed(whole, start, continues=continues)

    # -- where it begins ---------------------------------------------------------------------------

    def _start(
        self, turns: Sequence[Message], answer: Message, variables: Mapping[str, Any], asked: str, whole: str
    ) -> int:
        """Begin of an answer that does not follow the template's own opening: after what both begin with."""
        try:
            probe = self.template.text([*turns, {**answer, "content": _HERE}], variables, ask=False)
        except Refused:
            probe = ""
        words = probe.find(_HERE)
        if words < 0:
            return _shared(asked, whole)
        start = min(_shared(asked, probe), words)
        last = said(turns[-1]).strip() if turns else ""
        if last and probe.rfind(last, 0, words) + len(last) > start:
            start = words  # the renderings part within the turns before: the answer begins at its own words
        if whole.startswith(probe[:start]):
            return start
        at = whole.rfind(said(answer).strip()) if said(answer).strip() else -1
        return at if at >= 0 else _shared(asked, whole)

    def _begun(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The rendering up to the end of a begun turn."""
        marked = [*turns[:-1], {**turns[-1], "content": said(turns[-1]) + _HERE}]
        text = self.template.text(marked, variables, ask=False)
        if _HERE not in text:
            raise Refused("it leaves out the begun turn of the assistant that is to be continued")
        return text[: text.rindex(_HERE)]

    def _continued(self, turns: Sequence[Message], answer: Message, variables: Mapping[str, Any]) -> Finished:
        begun, more = said(turns[-1]), said(answer)
        before = [*turns[:-1]]
        whole = self.template.render(
            [*before, {**turns[-1], **answer, "content": begun + more}], variables, ask=False
        )
        try:
            parted = [*before, {**turns[-1], **answer, "content": begun + _HERE + more}]
            marked = self.template.text(parted, variables, ask=False)
        except Refused:
            marked = ""
        if _HERE in marked and marked.replace(_HERE, "") == whole.text:
            start = marked.index(_HERE)
            return self._closed(whole, start, continues=True)
        opened = self._begun(turns, variables)
        start = _shared(opened, whole.text)
        return self._closed(whole, start, continues=start == len(opened))

    # -- where it ends -----------------------------------------------------------------------------

    def close_with(self, ends: Sequence[str]) -> None:
        """Set the texts of the tokens that end a completion; the first one in the tail closes an answer."""
        found = next((m for m in self._control.finditer(self.tail) if m[0] in ends), None)
        self._stop = found.end() if found else len(self.tail.rstrip())

    def turn_end(self) -> str | None:
        """The control token right behind an assistant's last turn, if the template writes one there."""
        found = self._control.match(self.tail.lstrip())
        return found[0] if found else None

    def _closed(self, whole: Rendering, start: int, *, continues: bool) -> Finished:
        text = whole.text
        close = len(text) - len(self.tail)
        if close >= start and text.endswith(self.tail):
            return Finished(text, whole.typed, start, close, close + self._stop, continues)
        close = stop = len(text.rstrip())  # another ending, such as that of a turn that calls tools
        close = next((m.start() for m in self._control.finditer(text, start) if m.end() == stop), close)
        return Finished(text, whole.typed, min(start, close), close, stop, continues)

    def _ending(self) -> str:
        """The text behind the words of an assistant's last turn."""
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _HERE})
        text = self.template.text(turns, {}, ask=False)
        return text[text.rindex(_HERE) + len(_HERE) :] if _HERE in text else ""


def _shared(one: str, other: str) -> int:
    """How many characters two texts both begin with, by halving."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
