"""Find the answer in a conversation that the chat template has rendered.

The template decides how it renders an answer and the text before and after it. So this module never composes
an answer: it renders the finished conversation as a whole and finds the answer in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palate.model.codec.template import ChatTemplate, Refused, Rendering, Span
from palate.types import Message, said

_HERE = "\ue0f0palate\ue0f1"
"""A placeholder for an answer in renderings that are only inspected, never learnt."""


@dataclass(frozen=True)
class Finished:
    """A rendered conversation with its answer."""

    text: str
    typed: tuple[Span, ...]
    """Parts that look like control tokens but are not from the assistant."""
    start: int
    """The position at which the answer begins."""
    close: int
    """The position at which its words end."""
    stop: int
    """The position after the token with which the template closes it, or `close` if there is none."""
    continues: bool = True
    """True if the answer begins where sampling begins."""


class Finisher:
    """Renders conversations with their answers, and finds the answers in them."""

    def __init__(self, template: ChatTemplate, control: re.Pattern[str]) -> None:
        self.template = template
        self._control = control
        self.tail = self._ending()
        self._stop = 0

    def open(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> Rendering:
        """Render the turns before an answer; a begun turn of the assistant stays open.

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
        self, turns: Sequence[Message], answer: Message, variables: Mapping[str, Any], opened: str
    ) -> Finished:
        """Render the turns with their answer.

        Args:
            turns: the turns before the answer.
            answer: the assistant's turn.
            variables: values for the template besides the turns.
            opened: the text of `open` for the same turns.

        Raises:
            Refused: the template does not take this conversation.
        """
        if turns and turns[-1]["role"] == "assistant":
            return self._continued(turns, answer, variables)
        whole = self.template.render([*turns, answer], variables, ask=False)
        continues = whole.text.startswith(opened)
        start = len(opened) if continues else self._start(turns, answer, variables, opened, whole.text)
        return self._closed(whole, start, continues=continues)

    # -- where it begins ---------------------------------------------------------------------------

    def _start(
        self, turns: Sequence[Message], answer: Message, variables: Mapping[str, Any], opened: str, whole: str
    ) -> int:
        """Return the begin of an answer that does not follow the opening: the end of their common text."""
        try:
            probe = self.template.text([*turns, {**answer, "content": _HERE}], variables, ask=False)
        except Refused:
            probe = ""
        words = probe.find(_HERE)
        if words < 0:
            return _shared(opened, whole)
        start = min(_shared(opened, probe), words)
        last = said(turns[-1]).strip() if turns else ""
        if last and probe.rfind(last, 0, words) + len(last) > start:
            start = words  # the renderings differ within earlier turns: the answer begins at its own words
        if whole.startswith(probe[:start]):
            return start
        at = whole.rfind(said(answer).strip()) if said(answer).strip() else -1
        return at if at >= 0 else _shared(opened, whole)

    def _begun(self, turns: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """Return the rendering up to the end of a begun turn."""
        marked = [*turns[:-1], {**turns[-1], "content": said(turns[-1]) + _HERE}]
        text = self.template.text(marked, variables, ask=False)
        if _HERE not in text:
            raise Refused("it leaves out the begun turn of the assistant, which cannot be continued")
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
        closing = next((m for m in self._control.finditer(self.tail) if m[0] in ends), None)
        self._stop = closing.end() if closing else len(self.tail.rstrip())

    def turn_end(self) -> str | None:
        """Return the control token right after an assistant's last turn, if the template writes one there."""
        closing = self._control.match(self.tail.lstrip())
        return closing[0] if closing else None

    def _closed(self, whole: Rendering, start: int, *, continues: bool) -> Finished:
        text = whole.text
        close = len(text) - len(self.tail)
        if close >= start and text.endswith(self.tail):
            return Finished(text, whole.typed, start, close, close + self._stop, continues)
        close = stop = len(text.rstrip())  # another ending, such as that of a turn that calls tools
        close = next((m.start() for m in self._control.finditer(text, start) if m.end() == stop), close)
        return Finished(text, whole.typed, min(start, close), close, stop, continues)

    def _ending(self) -> str:
        """Return the text after the words of an assistant's last turn."""
        turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _HERE})
        text = self.template.text(turns, {}, ask=False)
        return text[text.rindex(_HERE) + len(_HERE) :] if _HERE in text else ""


def _shared(one: str, other: str) -> int:
    """Return the number of equal characters at the start of two texts, by bisection."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
