"""Find the parts of a conversation that a chat template leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from palate.model.codec.template import REASONING, ChatTemplate, Refused
from palate.types import Message, said

_WORD = "palatewitness"
_THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>(.*?)</\1>", re.DOTALL)
_STANDARD = frozenset(("role", "content", "tool_calls", *REASONING))
_MOST_PROBES = 32
"""The most extra renderings for a closer check; after them a missing part counts as left out."""


class Witness:
    """Reports the parts of conversations that are not in their renderings."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._probes = 0
        self._known: dict[str, bool] = {}

    def left_out(
        self, turns: Sequence[Message], variables: Mapping[str, Any], text: str
    ) -> Iterator[tuple[str, bool]]:
        """Yield the names of the parts of a finished conversation that its rendering lacks.

        Yields:
            The name, and True for a part of the answer, the last turn.
        """
        for number in range(len(turns)):
            last = number == len(turns) - 1
            yield from ((name, last) for name in self._of_turn(turns, number, variables, text))
        tools = variables.get("tools")
        if tools and not all(name in text for name in _names(tools)):
            yield "tools", False
        for name in variables:
            if name != "tools" and name not in self.template.source(tools):
                yield f"chat_template_kwargs: {name}", False

    def _of_turn(
        self, turns: Sequence[Message], number: int, variables: Mapping[str, Any], text: str
    ) -> Iterator[str]:
        turn = turns[number]
        role, words = turn["role"], said(turn).strip()
        if words and words not in text:
            thoughts = [m[2].strip() for m in _THOUGHT.finditer(words)]
            lost = [thought for thought in thoughts if thought and thought not in text]
            if lost and role == "assistant":
                yield "thoughts in turns of the assistant"
            elif not thoughts and not self._shows(turns, number, "content", variables, text):
                yield f"turns of the {role}"
        if len(turn) == 2 and "content" in turn:
            return  # the usual turn: a role and a content
        thought = next((turn[key] for key in REASONING if turn.get(key)), None)
        if thought is not None and str(thought).strip() not in text:
            yield next(key for key in REASONING if turn.get(key))
        calls = turn.get("tool_calls")
        if calls and not all(name in text for name in _names(calls)):
            yield "tool_calls"
        for key in turn:
            if key not in _STANDARD and not self._reads(key):
                yield f"key '{key}' of a turn"

    def _shows(
        self, turns: Sequence[Message], number: int, key: str, variables: Mapping[str, Any], text: str
    ) -> bool:
        """Return True if a part that is not in the rendering literally is rendered in another form."""
        if json.dumps(turns[number][key], ensure_ascii=False)[1:-1].strip() in text:
            return True
        self._probes += 1
        if self._probes > _MOST_PROBES:
            return False
        try:
            marked = [{**t, key: _WORD} if n == number else t for n, t in enumerate(turns)]
            return _WORD in self.template.text(marked, variables, ask=False)
        except Refused:
            return False

    def _reads(self, key: str) -> bool:
        if key not in self._known:
            self._known[key] = bool(re.search(rf"\b{re.escape(key)}\b", self.template.source()))
        return self._known[key]


def _names(described: Any) -> list[str]:
    """Return the names of tools or of calls."""
    functions = [each.get("function", each) for each in described if isinstance(each, Mapping)]
    return [str(f["name"]) for f in functions if isinstance(f, Mapping) and f.get("name")]
