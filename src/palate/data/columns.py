"""One row under our column names, and the error for a row that does not fit.

Our names are TRL's. A row may also use the names of other toolkits (`dialects`) if their meaning is
unambiguous. `system` becomes the system turn, `history` the turns before the prompt; `tools` and
`chat_template_kwargs` go to the chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain
from typing import Any

from palate.data.account import Account, RowError
from palate.data.dialects import LAST_ANSWER, MESSAGES, Foreign, Lines, translate
from palate.data.row import Row, near
from palate.data.turns import Turns, kind, parsed, read_turns, turns_in_text, without_nulls
from palate.errors import DataError
from palate.types import Content, Finish

NAMES = ("prompt", "chosen", "rejected", "completion", "messages", "text", "margin", "system", "tools",
         "chat_template_kwargs", "label", "finish", "chosen_finish", "rejected_finish")  # fmt: skip
"""Columns that Palate reads; it passes all others on."""

_ANSWERS = ("chosen", "rejected", "completion")
_FINISHES: Mapping[Any, Finish] = {"eos": "eos", "stop": "eos", "length": "length"}
_LIKELY = {
    "prompt": ("instruction", "question", "query", "problem", "input", "text"),
    "chosen": ("preferred", "accepted", "winner", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "loser", "rejected_response", "response_rejected"),
    "completion": ("output", "response", "answer", "chosen"),
    "messages": ("conversation", "dialogue", "turns"),
}


@dataclass(frozen=True)
class Fields:
    """A row's values under our names, without empty (null) columns."""

    row: Row
    values: Mapping[str, Any]
    """Values by our names."""
    names: Mapping[str, tuple[str, ...]]
    """The row's own columns from which each value is made."""
    mapped: Mapping[str, str]
    """The map that the user gave."""
    account: Account
    used: set[str] = field(default_factory=set)
    """Further columns of the row that a record uses, such as `tools`."""

    def rest(self, *read: str) -> dict[str, Any]:
        """Return the row's columns other than these."""
        used = self.used | {name for ours in read for name in self.names.get(ours, ())}
        return {name: value for name, value in self.row.columns.items() if name not in used}

    def fault(self, what: str, expected: str) -> RowError:
        """Return an error about this row."""
        where = self.row.where
        return RowError(f"{where}: {what}; expected {expected}. {_has(self.row.columns)}", where)

    def missing(self, ours: str, expected: str) -> RowError:
        """Return an error about a missing column, with the map that may fix it."""
        theirs, there = self.mapped.get(ours, ours), self.row.columns
        name = ours if theirs == ours else f"{ours} (column '{theirs}')"
        if theirs in there:
            return self.fault(f"{name} is null", f"{expected}; fill it or leave the row out")
        likely = next((name for name in _LIKELY.get(ours, ()) if name in there), None)
        likely = likely or next(iter(get_close_matches(theirs, there, n=1)), None)
        hint = f" Try --map {ours}={likely}." if likely else ""
        if not likely and not there.keys() <= set(NAMES):  # a column of another name may hold it
            hint = f" If it has another name, give --map {ours}=NAME."
        where = self.row.where
        return RowError(f"{where}: {name} is missing; expected {expected}. {_has(there)}{hint}", where)

    def note(self, text: str) -> None:
        """Count this row with a change that the user should know about."""
        self.account.note(text, self.row.where)

    def content(self, ours: str) -> Content:
        """Return a value as text or turns; a prompt includes its history and the system turn of the row.

        Raises:
            RowError: the value is neither.
        """
        value = self._text(self.values[ours])
        if isinstance(value, str):
            listed = turns_in_text(value)
            if listed is not None:
                self.note(f"turns in {ours} that are written as text are read as turns")
                return self.turns(ours, listed)
        if ours == "prompt":
            before = self._before(() if isinstance(value, str) else self.turns(ours))
            if isinstance(value, str):
                return (*before, {"role": "user", "content": value}) if before else value
            return (*before, *self.turns(ours))
        return value if isinstance(value, str) else self.turns(ours)

    def listed(self, ours: str) -> Sequence[Any]:
        """Return a value as a list of turns."""
        value = self.values[ours]
        value = turns_in_text(value) or value if isinstance(value, str) else value
        turns = [value] if isinstance(value, Mapping) else value
        if not isinstance(turns, list | tuple):
            kinds = "a list of chat turns" if ours == "messages" else "a text or a list of chat turns"
            raise self.fault(f"{ours} is {kind(value)}", kinds)
        if not turns:
            raise self.fault(f"{ours} is an empty list", "at least one chat turn")
        return turns

    def turns(self, ours: str, listed: Sequence[Any] | None = None) -> Turns:
        """Return a value as checked turns; messages include the system turn of the row.

        Raises:
            RowError: a turn has no role, an unknown role, or content that is not text.
        """
        listed = self.listed(ours) if listed is None else listed
        turns = listed if not self.row.columnar else without_nulls(listed)
        role = "assistant" if ours in _ANSWERS and len(turns) == 1 else None
        read = read_turns(turns, ours, self.fault, role=role)
        return (*self._before(read), *read) if ours == "messages" else read

    def with_system(self, turns: Turns) -> Turns:
        """Return the turns after the row's system turn."""
        return (*self._before(turns), *turns)

    def variables(self) -> dict[str, Any]:
        """Return values for the chat template: the row's `chat_template_kwargs` and `tools`.

        Raises:
            RowError: they are not an object and a list of tools.
        """
        merged: dict[str, Any] = {}
        for ours in ("chat_template_kwargs", "tools"):
            if not self.values.get(ours):
                continue
            value = self.values[ours]
            value = parsed(value) if isinstance(value, str) else value
            value = without_nulls(value) if self.row.columnar else value
            self.used.update(self.names[ours])
            if ours == "tools":
                merged["tools"] = self._tools(value)
            elif isinstance(value, Mapping):
                merged |= value
            else:
                raise self.fault(f"{ours} is {kind(self.values[ours])}", "an object, or its JSON text")
        return {name: value for name, value in merged.items() if value not in (None, [])}

    def finish(self, ours: str) -> Finish:
        """Return the finish reason of a text of the row; "eos" if the row has none."""
        why = _FINISHES.get(self.values.get(ours)) if isinstance(self.values.get(ours), str) else None
        if why is None:
            return "eos"
        self.used.update(self.names[ours])
        if why == "length":
            self.note("truncated texts get no end token")
        return why

    def _before(self, turns: Turns) -> Turns:
        """Return the row's system turn and history if the turns have none of their own."""
        before: list[Any] = []
        system = self.values.get("system")
        if system is not None and not isinstance(system, str):
            raise self.fault(f"{self.names['system'][0]} is {kind(system)}", "a text")
        if not system or (turns and turns[0]["role"] == "system"):
            if not system and "system" in self.names:
                self.used.update(self.names["system"])
        else:
            before.append({"role": "system", "content": system})
            self.used.update(self.names["system"])
        for turn in self.values.get("history") or ():
            if (
                not isinstance(turn, list | tuple)
                or len(turn) != 2
                or not all(isinstance(t, str) for t in turn)
            ):
                raise self.fault(
                    "history is not a list of pairs", 'pairs of texts, as [["asked", "answered"]]'
                )
            question, answer = turn
            before += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if self.values.get("history"):
            self.used.add("history")
        return tuple(before)

    def _text(self, value: Any) -> Any:
        if not isinstance(value, Lines):
            return value
        for name, text in value.columns.items():
            if not isinstance(text, str):
                raise self.fault(f"{name} is {kind(text)}", "a text")
        return "\n".join(text for text in value.columns.values() if text) or ""

    def _tools(self, value: Any) -> list[Any]:
        listed = [value] if isinstance(value, Mapping) else value
        if not isinstance(listed, list):
            raise self.fault(f"tools is {kind(self.values['tools'])}", "a list of tools, or its JSON text")
        tools = [parsed(tool) if isinstance(tool, str) else tool for tool in listed]
        for tool in tools:
            if not isinstance(tool, Mapping):
                raise self.fault(f"a tool is {kind(tool)}", "an object with the tool's name and parameters")
        # OpenAI's form has such a bare description under `function`.
        return [{"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
                for tool in tools]  # fmt: skip


def read_fields(
    source: str, rows: Iterator[Row], columns: Mapping[str, str], account: Account
) -> Iterator[Fields]:
    """Yield rows under our names. `columns` maps our names to the row's, which are taken literally.

    Raises DataError if it maps a name that is not ours, or to a column that no row has.
    """
    for row in _with_mapped(source, rows, columns):
        account.rows += 1
        if row.fault is None:
            yield _fields(row, columns, account)
        else:
            account.skip(row.fault)


def _with_mapped(source: str, rows: Iterator[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Return the rows, read up to the row from which on each mapped column has occurred."""
    for ours in columns:
        if ours not in NAMES:
            raise DataError(
                f"--map {ours}={columns[ours]}: '{ours}' is not a column that is read; expected one of "
                f"{', '.join(NAMES)} on the left.{near(ours, NAMES)}"
            )
    first: list[Row] = []
    there: dict[str, None] = {}
    while not there.keys() >= set(columns.values()):
        row = next(rows, None)
        if row is None:
            break
        first.append(row)
        there |= dict.fromkeys(row.columns)
    sound = any(row.fault is None for row in first)
    for ours, theirs in columns.items():
        if sound and theirs not in there:
            raise DataError(
                f"{source}: no row has the column '{theirs}' of --map {ours}={theirs}. "
                f"{_has(there)}{near(theirs, there)}"
            )
    return chain(first, rows)


def _fields(row: Row, columns: Mapping[str, str], account: Account) -> Fields:
    filled = {name: value for name, value in row.columns.items() if value is not None}
    names: dict[str, tuple[str, ...]] = {ours: (columns.get(ours, ours),) for ours in NAMES}
    for ours, theirs in columns.items():  # a mapped column loses the meaning of its own name
        if theirs in NAMES and theirs != ours and theirs not in columns:
            names.pop(theirs, None)
    names = {ours: theirs for ours, theirs in names.items() if theirs[0] in filled}
    values = {ours: filled[theirs[0]] for ours, theirs in names.items()}
    free = {
        name: value for name, value in filled.items() if name not in columns.values() and name not in names
    }
    if free:
        taken = frozenset(names) | {ours for ours in columns if ours in ("prompt", "messages")}
        for ours, (value, made_of) in translate(Foreign(free, taken)).items():
            values[ours], names[ours] = value, made_of
    if isinstance(free.get("history"), list) and ("instruction" in free or "query" in free):
        values["history"], names["history"] = free["history"], ("history",)
    if values.get("chosen") is MESSAGES:
        values["chosen"] = values["messages"]
    elif values.get("chosen") is LAST_ANSWER:
        values |= _last_answer(values.pop("messages"))
        if "chosen" not in values or values["chosen"] is LAST_ANSWER:
            values.pop("chosen", None)
            names.pop("chosen")
    return Fields(row, values, names, columns, account)


def _last_answer(messages: Any) -> dict[str, Any]:
    """Return messages split into the prompt and the answer, if they end in an answer."""
    turns = turns_in_text(messages) if isinstance(messages, str) else messages
    turns = turns if isinstance(turns, list) else []
    last = turns[-1] if turns else None
    if isinstance(last, Mapping) and (last.get("role") or last.get("from")) in ("assistant", "gpt"):
        return {"messages": turns[:-1], "chosen": [last]}
    return {"messages": messages}


def _has(columns: Mapping[str, Any]) -> str:
    return f"Columns: {', '.join(columns) or 'none'}."
