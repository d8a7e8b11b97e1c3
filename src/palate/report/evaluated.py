"""The page and the table of an evaluation, from the numbers of its `summary.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.report.pages import MOST_SAMPLES, write_page
from palate.report.plots import Interval, intervals
from palate.report.render import Drawn
from palate.report.words import count, interval, number, percent

Result = Mapping[str, Any]


def write_evaluation(result: Result, samples: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """Write the page of an evaluation.

    Raises:
        RunError: the file cannot be written.
    """
    head, rows = table(result)
    names = ", ".join(model["name"] for model in result["models"])
    baseline = result.get("baseline")
    shown = samples[:MOST_SAMPLES]
    return write_page(
        "evaluation.html.j2",
        target,
        kind="Palate evaluation",
        title=f"{names} against {baseline['name']}" if baseline else names,
        lead=_lead(result),
        note="",
        notes=notes(result),
        head=head,
        rows=rows,
        plots=list(_plots(result)),
        shown=f"The first {len(shown)} of {len(samples)} prompts, with the first completion of each side.",
        samples=beside_rows(shown),
    )


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table: a row for each number, a column for each side."""
    sides = [*result["models"], *([result["baseline"]] if result.get("baseline") else [])]
    best = {row["name"]: row for row in result.get("best_of", ())}
    sides = [{**best.get(side["name"], {}), **side} for side in sides]
    rows = [[label, *(cell(side) for side in sides)] for label, cell in CELLS]
    return ["", *(side["name"] for side in sides)], [row for row in rows if any(row[1:])]


def notes(result: Result) -> list[str]:
    """Return sentences on the way the numbers were measured."""
    prompts = f"{count(result['prompts'])} held-out prompt{'s' if result['prompts'] != 1 else ''}"
    orders = ", which is asked in both orders" if result.get("pairwise") else ""
    lines = [f"{prompts}; the annotator is {result['annotator']}{orders}."]
    if any("kl" in model for model in result["models"]):
        lines.append(
            "KL is in nats per completion, at temperature 1, from the baseline, ± its standard error."
        )
    for side in (*result["models"], *([result["baseline"]] if result.get("baseline") else [])):
        if truncated := side.get("text_truncated"):
            lines.append(
                f"{count(truncated)} of your texts are longer than the context of {side['name']}; the "
                "perplexity is that of their beginnings."
            )
    unusable = sum(model.get("unusable") or 0 for model in result["models"])
    if unusable:
        lines.append(f"{count(unusable)} comparisons have no usable verdict and are left out.")
    return lines


def _lead(result: Result) -> str:
    baseline = result.get("baseline")
    if baseline is None:
        best = max(result["best_of"], key=lambda row: row["best"] or 0.0)
        return f"{best['name']} is chosen best most often: {_rate(best, 'best')} of the prompts."
    parts = [f"{model['name']} wins {_rate(model, 'win_rate')}" for model in result["models"]]
    return f"Against {baseline['name']}: {'; '.join(parts)}."


def _rate(row: Mapping[str, Any], name: str, low: str | None = None, high: str | None = None) -> str:
    if row.get(name) is None:
        return ""
    bounds = interval(row.get(low or f"{name}_low"), row.get(high or f"{name}_high"))
    return f"{percent(row[name])} {bounds}".strip()


def _mean(row: Mapping[str, Any], name: str, digits: int = 3) -> str:
    if row.get(name) is None:
        return ""
    error = row.get(f"{name}_standard_error")
    return number(row[name], digits) + (f" ± {number(error, 2)}" if error is not None else "")


def _plain(name: str) -> Any:
    return lambda side: "" if side.get(name) is None else number(side[name])


def _share(name: str) -> Any:
    return lambda side: "" if side.get(name) is None else percent(side[name])


def _record(side: Mapping[str, Any]) -> str:
    return f"{side['wins']} / {side['ties']} / {side['losses']}" if "wins" in side else ""


CELLS: tuple[tuple[str, Any], ...] = (
    ("win rate", lambda side: _rate(side, "win_rate")),
    ("wins / ties / losses", _record),
    (
        "win rate at equal length",
        lambda side: _rate(
            side, "length_controlled_win_rate", "length_controlled_low", "length_controlled_high"
        ),
    ),
    ("chosen best", lambda side: _rate(side, "best")),
    ("mean quality score", lambda side: _mean(side, "score")),
    ("mean reward", lambda side: _mean(side, "reward")),
    ("KL", lambda side: _mean(side, "kl")),
    ("perplexity on your text", _plain("perplexity")),
    ("mean length (tokens)", _plain("tokens")),
    ("mean length (characters)", _plain("characters")),
    ("share ended", _share("ended")),
    ("distinct 1-grams", _share("distinct_1")),
    ("distinct 2-grams", _share("distinct_2")),
    ("distinct 3-grams", _share("distinct_3")),
    ("repeated 4-grams", _share("repetition")),
)
"""The rows of the table: label, and the text of a side's cell, empty if it was not measured."""


def _plots(result: Result) -> Iterator[Drawn]:
    rows = []
    for style, model in enumerate(result["models"]):
        for label, name, low, high in (
            ("", "win_rate", "win_rate_low", "win_rate_high"),
            (
                ", equal length",
                "length_controlled_win_rate",
                "length_controlled_low",
                "length_controlled_high",
            ),
        ):
            if None not in (model.get(name), model.get(low), model.get(high)):
                rows.append(
                    Interval(short(model["name"]) + label, model[name], model[low], model[high], style % 6)
                )
    if rows:
        against = result["baseline"]["name"]
        yield Drawn(
            "Against the baseline",
            f"Share of prompts won against {against}.",
            intervals(rows, "wins", "Win rates"),
        )
    best = [
        Interval(short(row["name"]), row["best"], row["best_low"], row["best_high"], style % 6)
        for style, row in enumerate(result.get("best_of", ()))
        if row["best"] is not None
    ]
    if best:
        yield Drawn(
            "Best of all",
            "Share of prompts on which each side's completion has the best reward.",
            intervals(best, "best", "Chosen best"),
        )


def short(name: str) -> str:
    """Return the end of a long path, for a plot's label."""
    return name if len(name) <= 22 else f"…{name[-21:]}"


def beside_rows(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return samples side by side for the page, each output with its reward and length in words."""
    return [_sample(sample) for sample in samples]


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    outputs = [
        {
            "name": output["name"],
            "text": output["text"],
            "detail": f"{number(output['reward'])} · {count(output['tokens'])} tokens",
        }
        for output in sample["outputs"]
    ]
    return {"prompt": sample["prompt"], "outputs": outputs}
