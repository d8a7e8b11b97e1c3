"""One warning about a run, the record that all checks return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["note", "worry"]


@dataclass(frozen=True)
class Sign:
    """One warning about a run: the measured numbers (`seen`), why they matter (`means`), advice (`do`)."""

    key: str
    level: Level
    title: str
    seen: str
    means: str
    do: str
