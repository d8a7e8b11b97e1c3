"""Convert the data's chat turns into turns with a role and a text each.

The supported forms are the turns of OpenAI and TRL (`role`, `content`) and of ShareGPT (`from`, `value`),
their tool calls, texts given as lists of parts, and lists of turns given as JSON text. Keys that a chat
template may read are kept.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from palate.data.account import RowError
from palate.types import Message

Turns = tuple[Message, ...]
Fault = Callable[[str, str], RowError]
"""Makes an error from a description of the fault and of the expected value."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
MARKS = ("weight", "train", "training", "loss")
"""Keys that mark turns that must not be learnt, with 0 or false."""
_RENAMED = ("from", "value", "role", "content", "function_call", *MARKS)


def turns_in_text(text: str) -> list[Any] | None:
    """Return the chat turns in a text that is JSON or a Python list; None for any other text."""
    begun = text.lstrip()[:2].replace(" ", "")
    if not begun.startswith(("[{", "{", "[")) or not any(
        f"{q}{key}{q}" in text for q in "'\"" for key in ("role", "from")
    ):
        return None
    value = parsed(text)
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list) or not turns:
        return None
    if not all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns):
        return None
    return turns


def parsed(text: str) -> Any:
    """Return the value of a text that is JSON or a Python literal; None for any other text."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            continue
    return None


def read_turns(turns: Sequence[Any], name: str, fault: Fault, *, role: str | None = None) -> Turns:
    """Check turns and convert them into one form.

    Args:
        turns: the row's turns.
        name: the name of their column, for messages.
        fault: makes the error.
        role: the role of turns without one.

    Raises:
        RowError: a turn has no role, an unknown role, or content that is not text.
    """
    read: list[Message] = []
    for number, turn in enumerate(turns, 1):
        read.append(_turn(turn, f"turn {number} of {name}", fault, role))
    return tuple(read)


def is_marked(turn: Any) -> bool:
    """Return True if the data mark this turn as one that must not be learnt."""
    return isinstance(turn, Mapping) and any(_is_no(turn.get(mark)) for mark in MARKS)


def _is_no(value: Any) -> bool:
    return value is False or (isinstance(value, int | float) and not isinstance(value, bool) and value == 0)


def without_nulls(value: Any) -> Any:
    """Return the value without empty entries, which columnar files add for keys of other records."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None or k in ("default", "const")}
    if isinstance(value, list | tuple):
        return [without_nulls(inner) for inner in value]
    return value


def _turn(turn: Any, name: str, fault: Fault, default: str | None) -> Message:
    if not isinstance(turn, Mapping):
        raise fault(f"{name} is {kind(turn)}", 'a turn such as {"role": "user", "content": "..."}')
    named = turn.get("role") or turn.get("from") or default
    role = _role(named)
    if role is None:
        what = f"has the role {named!r}" if named else "has no role"
        raise fault(f"{name} {what}", f"one of {', '.join(ROLES)}")
    content = turn["content"] if turn.get("content") is not None else turn.get("value")
    calls = turn.get("tool_calls") or turn.get("function_call")
    if turn.get("from") == "function_call":
        calls, content = content, ""
    read: dict[str, Any] = {"role": role}
    text = _text(content, name, fault, optional=bool(calls) or _thinks(turn))
    if text is not None:
        read["content"] = text
    if calls:
        if role != "assistant":
            raise fault(f"{name} is a turn of the {role} and calls tools", "calls in turns of the assistant")
        read["tool_calls"] = _calls(calls, name, fault)
    return read | {k: v for k, v in turn.items() if k not in (*_RENAMED, "tool_calls") and v is not None}


def _role(named: Any) -> str | None:
    if not isinstance(named, str):
        return None
    lower = named.strip().lower()
    return _ALIASES.get(lower, lower if lower in ROLES else None)


def _thinks(turn: Mapping[str, Any]) -> bool:
    return any(turn.get(key) for key in ("reasoning_content", "thinking", "reasoning"))


def _text(content: Any, name: str, fault: Fault, *, optional: bool) -> str | None:
    if isinstance(content, str):
        return content
    if content is None and optional:
        return None
    if not isinstance(content, list | tuple):
        raise fault(f"the content of {name} is {kind(content)}", "a text")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str):
            what = part.get("type") if isinstance(part, Mapping) else None
            raise fault(
                f"the content of {name} has a part of type {what or kind(part)!r}", "parts of type 'text'"
            )
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, name: str, fault: Fault) -> list[dict[str, Any]]:
    """Return tool calls in OpenAI's form, from that form, bare calls, or JSON text."""
    value = parsed(calls) if isinstance(calls, str) else calls
    listed = [value] if isinstance(value, Mapping) else value
    if not isinstance(listed, list | tuple) or not listed:
        raise fault(f"the tool call of {name} is {kind(calls)} that is not a call", 'a name with "arguments"')
    read = []
    for call in listed:
        call = parsed(call) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise fault(f"a tool call of {name} has no name", 'a name with "arguments"')
        inner = {"name": function["name"], "arguments": function.get("arguments", {})}
        inner |= {k: v for k, v in function.items() if k not in inner and v is not None}
        outer = {k: v for k, v in call.items() if v is not None} if "function" in call else {}
        read.append({"type": "function", **outer, "function": inner})
    return read


def kind(value: Any) -> str:
    """Return a name of the value's type, for messages."""
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", dict: "an object",
             list: "a list", type(None): "null", bytes: "bytes"}  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")
