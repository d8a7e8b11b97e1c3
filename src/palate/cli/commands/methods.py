"""`palate methods`: the requirements of each method, next to those stated by the survey article."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from palate.cli.command import Command, Json

QUESTIONS = {
    "no_human_preferences": "no human\nlabels",
    "unbiased_data": "unbiased\ndata",
    "online_feedback": "online\nfeedback",
    "no_external_api": "no API\ncost",
    "models": "models",
}
"""The table's column titles by cell name."""

WIDE = 100
"""The terminal width, in columns, from which the group and the paper are shown."""

NOTES = (
    "Learns from: the kind of rows in --data (docs/data.md). Of two kinds, pairs need `--variant direct`.",
    "The other columns describe each method's standard recipe. Unbiased data: completions are sampled from "
    "the policy in training. Models: number of models in memory; in brackets, with the alternative recipe.",
    "`palate run METHOD --help` explains a method; docs/methods/README.md explains the table.",
)


def methods(*, json: Json = False) -> int:
    """Print the table of methods."""
    rows = list(method_rows())
    if json:
        print(jsonlib.dumps(rows, indent=2))
        return 0
    console = Console()
    table = Table(box=None, pad_edge=False)
    wide = console.width >= WIDE
    titles = ["method", "learns from", *QUESTIONS.values(), *(["group", "paper"] if wide else [])]
    for title in titles:
        table.add_column(title, no_wrap=True)
    for row in rows:
        cells = (
            row["name"],
            " or ".join(row["learns_from"]),
            *(row[question] for question in QUESTIONS),
            row["group"],
            row["paper"].split(", arXiv")[0],
        )
        table.add_row(*cells[: len(titles)])
    console.print(table)
    for note in NOTES:
        console.print(note, soft_wrap=True, highlight=False)
    return 0


def method_rows() -> Iterator[dict[str, Any]]:
    """Yield a row per method with Palate's cells and, under `source`, the article's cells or None."""
    from palate.article import SOURCE
    from palate.method import METHOD_GROUPS
    from palate.methods import METHODS

    for method in sorted(METHODS.values(), key=lambda m: (METHOD_GROUPS.index(m.group), m.name)):
        source = SOURCE.get(method.name)
        yield {
            "name": method.name,
            "group": method.group,
            "paper": method.paper,
            "built": True,
            "learns_from": list(dict.fromkeys(way.learns_from for way in getattr(method, "ways", ()))),
            **asdict(method.recipe.cells),
            "source": None if source is None else asdict(source),
        }


COMMAND = Command(name="methods", help="Show all methods and what each one needs.", call=methods, order=5)
