"""A model's chat template: conversations to text, and the parts of the text that people typed.

A user may type `<|im_end|>`, and a tool may return it. Such text must reach the model as letters, and must
not change how the template renders the rest. So a conversation is always rendered unchanged. If a turn that
is not the assistant's has text that looks like a control token, a second rendering with private marks around
that text shows its position in the first rendering.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,  # the sandbox, filters and functions that chat templates expect
)

from palate.types import Message

PLAIN_CHAT = (
    "{% for m in messages %}{{ '' if loop.first else '\n\n' }}"
    "{{ m['role'] | capitalize }}: {{ m['content'] }}{% endfor %}"
    "{{ '\n\nAssistant:' if add_generation_prompt else '' }}"
)
"""The layout of chat rows for a model without a chat template."""

Span = tuple[int, int]
"""Begin and end in a text, in characters."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys of the thoughts of a turn in various toolkits; templates read one of the first two."""

_PRIVATE = range(0xE000, 0xF8FF)
TEMPLATE_ERRORS = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that a template may raise, because templates are programs that may not expect every row."""

_PROBE = "palateprobe"
_PROBE_CALL = '{"palate": "probe"}'


class Refused(Exception):  # noqa: N818 - says what happened, as KeyboardInterrupt does
    """The chat template cannot render a conversation; the text is the template's own reason."""


@dataclass(frozen=True)
class Rendering:
    """A conversation as text, and the parts of it that look like control tokens but are plain text."""

    text: str
    typed: tuple[Span, ...] = ()


class ChatTemplate:
    """The chat template of a tokenizer, or the plain layout for a model that has none.

    Args:
        tokenizer: a transformers tokenizer.
        variables: values that every rendering gets, such as `enable_thinking`.
        now: the date and time that templates print.
    """

    def __init__(self, tokenizer: Any, *, variables: Mapping[str, Any], now: datetime) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables)
        self.now = now
        self._special = dict(tokenizer.special_tokens_map)
        self._control = re.compile("(?!)")
        self._as_text: bool | None = None
        self._in_parts = False
        self._in_parts = self._wants_parts()

    def mark_control(self, control: re.Pattern[str]) -> None:
        """Set the pattern of texts that the tokenizer reads as control tokens."""
        self._control = control

    def source(self, tools: Any = None) -> str:
        """Return the template's Jinja text; some models have another one for conversations with tools."""
        if not self.tokenizer.chat_template:
            return PLAIN_CHAT
        return str(self.tokenizer.get_chat_template(None, tools))

    @property
    def prints_date(self) -> bool:
        """Return True if a rendering may depend on the date."""
        return "strftime_now" in self.source()

    def literals(self) -> str:
        """Return the texts that the template itself writes, joined by null characters."""
        tree = _compile_jinja_template(self.source()).environment.parse(self.source())
        texts = [node.data for node in tree.find_all(nodes.TemplateData)]
        texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
        return "\0".join(texts)

    def text(self, turns: Sequence[Message], variables: Mapping[str, Any], *, ask: bool) -> str:
        """Render the turns; with `ask`, open the assistant's next turn.

        Raises:
            Refused: the template does not take this conversation.
        """
        given = {**self.variables, **variables}
        tools = given.pop("tools", None)
        try:
            template = _compile_jinja_template(self.source(tools))
            return str(
                template.render(
                    **{"strftime_now": self.now.strftime, **self._special, **given},
                    messages=[self._ready(turn) for turn in turns],
                    tools=tools,
                    documents=given.get("documents"),
                    add_generation_prompt=ask,
                )
            )
        except TEMPLATE_ERRORS as error:
            raise Refused(f"{error}" or type(error).__name__) from error

    def render(self, turns: Sequence[Message], variables: Mapping[str, Any], *, ask: bool) -> Rendering:
        """Render the turns, and find texts like control tokens in turns that are not the assistant's.

        Raises:
            Refused: the template does not take this conversation.
        """
        text = self.text(turns, variables, ask=ask)
        others = [turn for turn in turns if turn["role"] != "assistant"]
        if not any(self._control.search(part) for part in _strings([others, variables])):
            return Rendering(text)
        return Rendering(text, self._typed(text, turns, variables, ask=ask))

    def _typed(
        self, text: str, turns: Sequence[Message], variables: Mapping[str, Any], *, ask: bool
    ) -> tuple[Span, ...]:
        everything = {c for part in _strings([turns, variables, text]) for c in part}
        unused = (chr(code) for code in _PRIVATE if chr(code) not in everything)
        begin, end = next(unused), next(unused)

        def mark(part: str) -> str:
            return self._control.sub(lambda match: f"{begin}{match[0]}{end}", part)

        marked = [t if t["role"] == "assistant" else _each_string(t, mark, keep=("role",)) for t in turns]
        try:
            rendered = self.text(marked, _each_string(variables, mark), ask=ask)
        except Refused:
            rendered = ""
        spans, opened = [], 0
        for before, char in enumerate(re.finditer(f"[{begin}{end}]", rendered)):
            at = char.start() - before
            if char[0] == begin:
                opened = at
            else:
                spans.append((opened, at))
        if rendered.replace(begin, "").replace(end, "") == text:
            return tuple(spans)
        return tuple(self._search(text, turns))  # the template inspects the typed text

    def _search(self, text: str, turns: Sequence[Message]) -> Iterator[Span]:
        """Find typed text by searching for each turn's words after those of the turn before."""
        behind = 0
        for turn in turns:
            words = str(turn.get("content") or "").strip()
            at = text.find(words, behind)
            at = at if at >= 0 else text.find(words)
            if not words or at < 0:
                continue
            behind = at + len(words)
            if turn["role"] != "assistant":
                yield from ((at + m.start(), at + m.end()) for m in self._control.finditer(words))

    # -- one turn ----------------------------------------------------------------------------------

    def _ready(self, turn: Message) -> dict[str, Any]:
        """Return the turn as templates expect it: reasoning under its usual keys, calls in their form."""
        ready = dict(turn)
        thought = next((turn[key] for key in REASONING if turn.get(key) is not None), None)
        if thought is not None:
            ready = {"thinking": thought, **ready, "reasoning_content": thought}
        if turn.get("tool_calls"):
            ready["tool_calls"] = [self._call(call) for call in turn["tool_calls"]]
        if self._in_parts and isinstance(ready.get("content"), str):
            ready["content"] = [{"type": "text", "text": ready["content"]}]
        return ready

    def _wants_parts(self) -> bool:
        """Return True if the template only renders texts in lists of parts, as vision models' do."""
        for parts in (False, True):
            self._in_parts = parts
            try:
                text = self.text([{"role": "user", "content": _PROBE}], {}, ask=False)
            except Refused:
                continue
            if _PROBE in text:
                return parts
        return False

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call.get("function", call)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and not self._takes_text():
            arguments = _parsed(arguments)
        elif isinstance(arguments, Mapping) and self._needs_text():
            arguments = json.dumps(arguments, ensure_ascii=False)
        changed = {**function, **({} if arguments is None else {"arguments": arguments})}
        return {**call, "function": changed} if "function" in call else changed

    def _takes_text(self) -> bool:
        """Return True if arguments in JSON text are rendered unchanged, not quoted again or refused."""
        if self._as_text is None:
            self._as_text = _PROBE_CALL in self._probe_call(_PROBE_CALL)
        return self._as_text

    def _needs_text(self) -> bool:
        return self._takes_text() and not self._probe_call(json.loads(_PROBE_CALL))

    def _probe_call(self, arguments: Any) -> str:
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "f", "arguments": arguments}}
        user = {"role": "user", "content": "?"}
        template = _compile_jinja_template(self.source())
        for content in ({"content": ""}, {}):  # some templates want calls without content, some need the key
            turn = {"role": "assistant", **content, "tool_calls": [call]}
            try:
                text = str(
                    template.render(messages=[user, turn], strftime_now=self.now.strftime, **self._special)
                )
            except TEMPLATE_ERRORS:
                continue
            if "palate" in text:
                return text
        return ""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for inner in value.values() if isinstance(value, Mapping) else value:
            if isinstance(inner, str):
                yield inner
            else:
                yield from _strings(inner)


def _each_string(value: Any, change: Callable[[str], str], *, keep: tuple[str, ...] = ()) -> Any:
    """Return the value with every string in it changed, except under the keys in `keep`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: v if k in keep else _each_string(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_each_string(inner, change) for inner in value]
    return value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
