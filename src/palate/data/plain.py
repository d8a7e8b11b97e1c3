"""Rows of data as JSON texts and back, exactly."""

from __future__ import annotations

import json
from typing import Any

from palate.types import Comparison, Content, Demonstration, Prompt

Stored = Comparison | Demonstration
"""The rows that can be stored."""


def to_json(row: Stored) -> bytes | None:
    """Return the row as JSON in UTF-8; None if JSON cannot express it exactly.

    Columns of Parquet files may hold dates, and rows given in Python may hold any object.
    """
    prompt = row.prompt
    parts: list[Any] = [_plain(prompt.content), dict(prompt.columns), prompt.where, dict(prompt.variables)]
    if isinstance(row, Comparison):
        parts += [
            _plain(row.chosen),
            _plain(row.rejected),
            row.margin,
            row.chosen_finish,
            row.rejected_finish,
        ]
    else:
        parts += [_plain(row.completion), row.finish]
    try:
        text = json.dumps(parts, ensure_ascii=False)
        data = text.encode()
    except (TypeError, ValueError, RecursionError):
        return None
    simple = not prompt.columns and not prompt.variables and all(isinstance(p, str) for p in parts[4:6])
    if not (simple and isinstance(prompt.content, str)) and json.loads(text) != parts:
        return None  # such as a tuple, which would become a list
    return data


def from_json(data: bytes) -> Stored:
    """Return the row of `to_json`."""
    content, columns, where, variables, *rest = json.loads(data)
    prompt = Prompt(_content(content), columns, where, variables)
    if len(rest) == 2:
        return Demonstration(prompt, _content(rest[0]), rest[1])
    chosen, rejected, margin, *finishes = rest
    return Comparison(prompt, _content(chosen), _content(rejected), margin, *finishes)


def _plain(content: Content) -> Any:
    return content if isinstance(content, str) else list(content)


def _content(value: Any) -> Content:
    return value if isinstance(value, str) else tuple(value)
