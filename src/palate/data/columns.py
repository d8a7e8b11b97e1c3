"""One row under our column names, and what is said when it does not fit.

Our names are TRL's. Without a map a row may also have the names of other tools, where they can mean
one thing only; a name of ours in the same row goes first:

- `instruction` for `prompt` (Llama-Factory, distilabel), with a filled `input` on a line after it;
- `output` for `completion`, beside an `instruction`;
- `conversations` for `messages`, and turns of `from` and `value` for `role` and `content` (ShareGPT);
- beside `instruction` or `conversations`, a filled `system` is the system turn.

`question`, `query` and `response` are not taken unasked: such rows often need a second column (a context,
a choice of answers), and leaving it out would go unnoticed. The error for them names the map to give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from palate.data.rows import Row, near
from palate.errors import DataError
from palate.types import Content, Message

NAMES = ("prompt", "chosen", "rejected", "completion", "messages", "text", "margin")
"""Columns that are read; every other one is passed on."""

Turns = tuple[Message, ...]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
_LIKELY = {
    "prompt": ("instruction", "question", "query", "problem", "input", "text"),
    "chosen": ("preferred", "accepted", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "loser", "rejected_response", "response_rejected"),
    "completion": ("output", "response", "answer", "chosen"),
    "messages": ("conversation", "dialogue", "turns"),
}


@dataclass(frozen=True)
class Fields:
    """A row as what our names stand for in it, without empty (null) columns."""

    row: Row
    values: Mapping[str, Any]
    """By our name."""
    names: Mapping[str, tuple[str, ...]]
    """The row's own columns that each value was made of."""
    mapped: Mapping[str, str]
    """The map that was given."""

    def rest(self, *read: str) -> dict[str, Any]:
        """The row's other columns, once these of ours are read."""
        used = {name for ours in read for name in self.names.get(ours, ())}
        return {name: value for name, value in self.row.columns.items() if name not in used}

    def fault(self, what: str, expected: str) -> DataError:
        """An error about this row."""
        return DataError(f"{self.row.where}: {what}; expected {expected}. {_has(self.row.columns)}")

    def missing(self, ours: str, expected: str) -> DataError:
        """An error about a column that this row lacks, with the map that may mend it."""
        theirs, there = self.mapped.get(ours, ours), self.row.columns
        name = ours if theirs == ours else f"{ours} (column '{theirs}')"
        if theirs in there:
            return self.fault(f"{name} is null", f"{expected}; fill it or leave the row out")
        likely = next((name for name in _LIKELY.get(ours, ()) if name in there), None)
        likely = likely or next(iter(get_close_matches(theirs, there, n=1)), None)
        hint = f"Try --map {ours}={likely}." if likely else f"Has it another name? Then --map {ours}=NAME."
        return DataError(f"{self.row.where}: {name} is missing; expected {expected}. {_has(there)} {hint}")

    def content(self, ours: str) -> Content:
        """A value as text or as turns."""
        value = self.values[ours]
        return value if isinstance(value, str) else self.turns(ours)

    def turns(self, ours: str) -> Turns:
        """A value as checked turns with a role and a content each; their other keys are left out."""
        value = self.values[ours]
        turns = [value] if isinstance(value, Mapping) else value
        if not isinstance(turns, list | tuple):
            kinds = "a list of chat turns" if ours == "messages" else "a text or a list of chat turns"
            raise self.fault(f"{ours} is {_kind(value)}", kinds)
        if not turns:
            raise self.fault(f"{ours} is an empty list", "at least one chat turn")
        return tuple(self._turn(turn, f"turn {number} of {ours}") for number, turn in enumerate(turns, 1))

    def _turn(self, turn: Any, name: str) -> Message:
        if not isinstance(turn, Mapping):
            raise self.fault(f"{name} is {_kind(turn)}", 'a turn such as {"role": "user", "content": "..."}')
        role = turn.get("role") or turn.get("from")
        content = turn["content"] if turn.get("content") is not None else turn.get("value")
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            what = f"has the role {role!r}" if role else "has no role"
            raise self.fault(f"{name} {what}", f"one of {', '.join(_ROLES)}")
        if turn.get("tool_calls"):
            raise self.fault(f"{name} calls tools", "turns of text only")
        if not isinstance(content, str):
            raise self.fault(f"the content of {name} is {_kind(content)}", "a text")
        return {"role": role, "content": content}


def read_fields(source: str, rows: Iterator[Row], columns: Mapping[str, str]) -> list[Fields]:
    """Rows under our names. `columns` maps our names to the row's and takes exactly the column it names.

    Raises DataError if it maps a name that is not ours, or to a column that no row has.
    """
    for ours in columns:
        if ours not in NAMES:
            raise DataError(
                f"--map {ours}={columns[ours]}: '{ours}' is not a column that is read; expected one of "
                f"{', '.join(NAMES)} on the left.{near(ours, NAMES)}"
            )
    kept = list(rows)
    there = dict.fromkeys(name for row in kept for name in row.columns)
    for ours, theirs in columns.items():
        if theirs not in there:
            raise DataError(
                f"{source}: no row has the column '{theirs}' of --map {ours}={theirs}. "
                f"{_has(there)}{near(theirs, there)}"
            )
    return [_fields(row, columns) for row in kept]


def _fields(row: Row, columns: Mapping[str, str]) -> Fields:
    filled = {name: value for name, value in row.columns.items() if value is not None}
    names = {ours: (columns.get(ours, ours),) for ours in NAMES}
    for ours, theirs in columns.items():  # a column that is mapped is no longer what its own name says
        if theirs in NAMES and theirs != ours and theirs not in columns:
            names.pop(theirs, None)
    names = {ours: theirs for ours, theirs in names.items() if theirs[0] in filled}
    fields = Fields(row, {ours: filled[theirs[0]] for ours, theirs in names.items()}, names, columns)
    free = {name for name in filled if name not in columns.values()}
    if "prompt" not in names and "prompt" not in columns and "instruction" in free:
        return _alpaca(fields, filled, free)
    if "messages" not in names and "messages" not in columns and "conversations" in free:
        return _sharegpt(fields, filled, free)
    return fields


def _alpaca(fields: Fields, filled: Mapping[str, Any], free: set[str]) -> Fields:
    used = ["instruction", *(name for name in ("input", "system") if name in free)]
    texts = {name: _text(fields, name) for name in used}
    if filled.get("history"):
        raise fields.fault("the instruction has a history", "one turn, or a prompt that is a list of turns")
    text = texts["instruction"] + (f"\n{texts['input']}" if texts.get("input") else "")
    prompt: str | Turns = text
    if texts.get("system"):
        prompt = ({"role": "system", "content": texts["system"]}, {"role": "user", "content": text})
    values, names = {**fields.values, "prompt": prompt}, {**fields.names, "prompt": tuple(used)}
    if "completion" not in names and "output" in free:
        values["completion"], names["completion"] = filled["output"], ("output",)
    return replace(fields, values=values, names=names)


def _sharegpt(fields: Fields, filled: Mapping[str, Any], free: set[str]) -> Fields:
    values, names = {**fields.values, "messages": filled["conversations"]}, {**fields.names}
    names["messages"] = ("conversations",)
    if "system" in free and (system := _text(fields, "system")):
        turns = replace(fields, values=values).turns("messages")
        if turns[0]["role"] != "system":
            values["messages"] = [{"role": "system", "content": system}, *turns]
            names["messages"] = ("conversations", "system")
    return replace(fields, values=values, names=names)


def _text(fields: Fields, name: str) -> str:
    value = fields.row.columns[name]
    if not isinstance(value, str):
        raise fields.fault(f"{name} is {_kind(value)}", "a text")
    return value


def _has(columns: Mapping[str, Any]) -> str:
    return f"Columns: {', '.join(columns) or 'none'}."


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "a text", dict: "an object",
             list: "a list", type(None): "null", bytes: "bytes"}  # fmt: skip
    return kinds.get(type(value), f"a {type(value).__name__}")
