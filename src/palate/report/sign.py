"""A sign in a run: the record that all of them give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["note", "worry"]


@dataclass(frozen=True)
class Sign:
    """Something seen in a run: what, in numbers; what it means; what to do."""

    key: str
    level: Level
    title: str
    seen: str
    means: str
    do: str
