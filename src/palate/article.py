"""The table of the blog article that lists this family of methods.

docs/methods/README.md lists the cells in which our own table differs, with reasons.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from palate.recipe import Answer, Cells

_ANSWERS: Mapping[str, Answer] = MappingProxyType({"O": "yes", "X": "no", "-": "partly"})


def _cells(marks: str, models: str) -> Cells:
    """Return cells from four marks: O is yes, X is no, - is partly (a triangle in the article)."""
    a, b, c, d = (_ANSWERS[mark] for mark in marks)
    return Cells(a, b, c, d, models)


SOURCE: Mapping[str, Cells] = MappingProxyType(
    {
        "rlhf": _cells("XOOO", "4"),
        "rlaif": _cells("OOOX", "4"),
        "rest": _cells("XOOO", "4"),
        "slic-hf": _cells("XXXO", "2 (1)"),
        "dpo": _cells("XXXO", "2 (1)"),
        "ipo": _cells("XXXO", "2 (1)"),
        "rrhf": _cells("X-XO", "1 (2)"),
        "click": _cells("X-XO", "1 (2)"),
        "spin": _cells("O-OO", "2 (1)"),
        "rft": _cells("XOOO", "2"),
        "rso": _cells("XOXO", "3"),
        "iterative-dpo": _cells("XOOO", "3 (2)"),
        "self-rewarding": _cells("-OOO", "2 (1)"),
        "oaif": _cells("OOOX", "2 (1)"),
    }
)
"""The article's rows in its order, with our names."""
