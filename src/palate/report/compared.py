"""The report of a comparison, from the numbers of its `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.article import SOURCE
from palate.report.evaluated import beside_rows
from palate.report.pages import MOST_SAMPLES, write_page
from palate.report.render import Drawn
from palate.report.scatter import Dot, scatter
from palate.report.words import count, duration, interval, number, percent

Result = Mapping[str, Any]
Columns = tuple[tuple[str, Callable[[Result, Result], str]], ...]


def write_comparison(result: Result, samples: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """Write the report of a comparison.

    Raises:
        RunError: the file cannot be written.
    """
    head, rows = table(result, QUALITY)
    spent_head, spent_rows = table(result, SPENT)
    article_head, article_rows = article(result)
    shown = samples[:MOST_SAMPLES]
    budget = result["budget"]
    return write_page(
        "comparison.html.j2",
        target,
        kind="Palate comparison",
        title=", ".join(row["name"] for row in result["methods"]),
        lead=_lead(result),
        note="",
        budget=_budget(budget),
        sentences=result["sentences"],
        gold_sentences=result.get("gold_sentences", []),
        head=head,
        rows=rows,
        spent_head=spent_head,
        spent_rows=spent_rows,
        article_head=article_head,
        article_rows=article_rows,
        matrix=matrix(result),
        plots=list(_plots(result)),
        shown=f"The first {len(shown)} of {len(samples)} test prompts, with the first seed of each method.",
        samples=beside_rows(shown),
    )


def table(result: Result, columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table of measured columns, a row for each method, best first."""
    rows = sorted(result["methods"], key=lambda row: -(row["win_rate"] or 0.0))
    cells = [[cell(row, result) for _, cell in columns] for row in rows]
    used = [i for i, _ in enumerate(columns) if any(row[i] for row in cells)]
    return [columns[i][0] for i in used], [[row[i] for i in used] for row in cells]


def _span(row: Result, name: str) -> str:
    value, low, high = row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high")
    if value is None:
        return ""
    ends = f" [{number(low)}, {number(high)}]" if low is not None and high is not None else ""
    return number(value) + ends


def _rate(row: Result, result: Result) -> str:
    return f"{percent(row['win_rate'])} {interval(row['win_rate_low'], row['win_rate_high'])}"


def _seeds(row: Result, result: Result) -> str:
    return " ".join(percent(rate).replace("\N{NO-BREAK SPACE}%", "") for rate in row["win_rate_by_seed"])


def _money(row: Result, result: Result) -> str:
    return f"${row['cost']:.2f}" if row.get("cost") else ""


QUALITY: Columns = (
    ("method", lambda row, _: row["name"]),
    ("reward", lambda row, result: "" if result["pairwise"] else _span(row, "reward")),
    ("hidden reward", lambda row, _: _span(row, "gold")),
    ("win rate over the base", _rate),
    ("by seed, %", _seeds),
    ("at equal length", lambda row, _: percent(row["length_controlled_win_rate"])),
    ("KL (nats)", lambda row, _: _span(row, "kl")),
    ("tokens each", lambda row, _: number(row["tokens_each"])),
    ("ended", lambda row, _: percent(row["ended"])),
)
SPENT: Columns = (
    ("method", lambda row, _: row["name"]),
    ("sampled tokens", lambda row, _: count(row["tokens"])),
    ("completions", lambda row, _: count(row["completions"])),
    ("verdicts", lambda row, _: count(row["verdicts"])),
    ("money", _money),
    ("optimizer steps", lambda row, _: count(row["steps"])),
    ("learning rate", lambda row, _: "" if row["lr"] is None else f"{row['lr']:g}"),
    ("time", lambda row, _: duration(row["seconds"])),
    ("processor time", lambda row, _: duration(row["cpu_seconds"])),
    ("peak memory (GB)", lambda row, _: number(row["peak_memory_gb"])),
    ("models", lambda row, _: row["models"]),
)
SHORT: Columns = tuple(column for column in QUALITY if column[0] not in ("by seed, %", "ended"))
"""Columns of the tables: label, and text of a cell from a method's row and the result."""


def article(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the article's table for the compared methods, with measured columns beside its own."""
    questions = {
        "no_human_preferences": "no human labels",
        "unbiased_data": "unbiased data",
        "online_feedback": "online feedback",
        "no_external_api": "no API cost",
        "models": "models",
    }
    head = ["method", *questions.values(), "measured: win rate", "KL", "verdicts", "peak memory (GB)"]
    rows = []
    for row in result["methods"]:
        cells = SOURCE.get(row["method"])
        stated = [str(getattr(cells, name)) if cells is not None else "" for name in questions]
        measured = [percent(row["win_rate"]), number(row["kl"]), count(row["verdicts"])]
        rows.append([row["name"], *stated, *measured, number(row["peak_memory_gb"])])
    return head, rows


def matrix(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the win-rate matrix: the row's method against the column's."""
    names = result["matrix"]["names"]
    cells = {(cell["row"], cell["column"]): cell for cell in result["matrix"]["cells"]}
    rows = []
    for one in names:
        row = [one]
        for other in names:
            cell = cells.get((one, other))
            row.append(
                "" if cell is None else f"{percent(cell['rate'])} {interval(cell['low'], cell['high'])}"
            )
        rows.append(row)
    return ["wins against", *names], rows


def _lead(result: Result) -> str:
    best = max(result["methods"], key=lambda row: row["win_rate"] or 0.0)
    return (
        f"{best['name']} wins most often against the model before training: {percent(best['win_rate'])} "
        f"{interval(best['win_rate_low'], best['win_rate_high'])} of {count(result['test_prompts'])} "
        f"prompts, with {count(len(best['seeds']))} seed{'s' * (len(best['seeds']) != 1)}, by "
        f"{result['annotator']}."
    )


def _budget(budget: Mapping[str, Any]) -> str:
    spent = f"{count(budget['steps'])} optimizer step{'s' if budget['steps'] != 1 else ''}"
    if budget["unit"] != "steps":
        spent = f"{number(budget['amount'])} {_unit(budget['unit'])} and about {spent}"
    return f"Each method may spend {spent}; the table has what it spent."


def _unit(unit: str) -> str:
    return {
        "tokens": "sampled tokens",
        "verdicts": "verdicts",
        "cost": "dollars",
    }.get(unit, unit)


def _plots(result: Result) -> Iterator[Drawn]:
    methods = result["methods"]
    yield Drawn(
        "Reward against distance",
        "Large marks are the runs' results, small ones their earlier checkpoints, which are measured on the "
        f"first {count(result['frontier_prompts'])} test prompts only. KL in nats per completion.",
        scatter(_frontier(result), "frontier", "Reward against KL", "KL from the start", "reward"),
    )
    name = "win_rate" if result["pairwise"] else "reward"
    label = "win rate" if result["pairwise"] else "reward"

    def dots(x: str, y: str) -> dict[str, list[list[Dot]]]:
        return {
            row["name"]: [[Dot(row[x], row[y], row.get(f"{y}_low"), row.get(f"{y}_high"))]]
            for row in methods
            if row[x] is not None and row[y] is not None
        }

    yield Drawn(
        "Reward against budget",
        "Mean over the seeds with its interval, against the tokens that a run sampled, its data included.",
        scatter(
            dots("tokens", name), "budget", "Reward against budget", "sampled tokens", label, from_zero=True
        ),
    )
    yield Drawn(
        "Length against win rate",
        f"A rise with length may be the annotator's taste for it. The base writes "
        f"{number(result['base']['tokens'])} tokens.",
        scatter(
            dots("tokens_each", "win_rate"), "length", "Length against win rate", "tokens of a completion",
            "win rate over the base", guide=0.5,
        ),
    )  # fmt: skip


def _frontier(result: Result) -> dict[str, list[list[Dot]]]:
    lines: dict[str, dict[int, list[Any]]] = {row["name"]: {} for row in result["methods"]}
    for point in result["frontier"]:
        if point["kl"] is not None and point["reward"] is not None:
            lines[point["arm"]].setdefault(point["seed"], []).append(point)
    start = Dot(0.0, result["base"]["reward"], faint=True)
    finite_start = [start] if math.isfinite(start.y) and not result["pairwise"] else []
    return {
        name: [
            finite_start
            + [
                Dot(point["kl"], point["reward"], faint=not point["result"])
                for point in sorted(points, key=lambda p: (p["step"], p["result"]))
            ]
            for points in seeds.values()
        ]
        for name, seeds in lines.items()
        if seeds
    }
