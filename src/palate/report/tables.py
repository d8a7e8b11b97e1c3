"""Figures and tables of a report. Tables have one text cell per run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from palate.report.panels import letter, panels_of_one_value
from palate.report.plots import Interval
from palate.report.words import count, duration, interval, moment, number, percent, signed
from palate.rundir import RunRecord

ARROW = " \N{RIGHTWARDS ARROW} "

MEASURED_WITH = (
    "eval_data", "eval_split", "eval_limit", "model", "reward", "missing_eos_penalty", "max_new_tokens",
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
)  # fmt: skip
"""Settings of the evaluation. If they differ between runs, held-out figures cannot be compared."""

_ACCOUNT = {
    "rows": "rows read",
    "used": "rows used",
    "tokens": "tokens per row",
    "skipped": "rows skipped",
    "dropped": "rows left out",
    "unused": "not used",
    "notes": "notes",
}
"""Labels for the parts of a data set's account."""

Rows = list[tuple[str, tuple[str, ...]]]
SettingRows = list[tuple[str, bool, tuple[str, ...]]]


class Figure(NamedTuple):
    """One of the main numbers at the head of the page."""

    label: str
    value: str
    detail: str = ""


def figures(run: RunRecord) -> tuple[Figure, ...]:
    """Return the main numbers of a run, as far as they were measured."""
    shown = []
    for label, name, size, unit in (
        ("Win rate", "win_rate", "compared", "prompts"),
        ("Held-out accuracy", "accuracy", "held_out_pairs", "pairs"),
    ):
        if bounds := _interval(run, name):
            rate, low, high = bounds
            total = run.figure(size)
            of_data = "" if total is None else f", {count(total)} {unit}"
            shown.append(Figure(label, percent(rate), f"{interval(low, high)}{of_data}"))
    before, after = run.figure("reward_before"), run.figure("reward_after")
    if before is not None and after is not None:
        shown.append(
            Figure("Mean reward", number(after), f"{signed(after - before, 3)} from {number(before)}")
        )
    if (kl := run.figure("kl")) is not None:
        shown.append(Figure("KL from before", number(kl), "nats per completion"))
    before, after = run.figure("length_before"), run.figure("length_after")
    if before is not None and after is not None:
        shown.append(Figure("Mean length", number(after), f"tokens, {number(before)} before"))
    for label, name in (("Held-out loss", "loss"), ("Calibration error", "ece")):
        before, after = run.figure(f"{name}_before"), run.figure(f"{name}_after")
        if before is not None and after is not None:
            shown.append(Figure(label, number(after), f"{number(before)} before"))
    if shown and run.status.seconds:
        shown.append(Figure("Time", duration(run.status.seconds), f"{count(run.status.step)} steps"))
    return tuple(shown)


def held_out(runs: Sequence[RunRecord]) -> Rows:
    """Return the rows of held-out figures that at least one run has."""
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("Win rate against the model before", lambda run: _rate(run, "win_rate")),
        ("Mean reward", lambda run: _change(run, "reward", number)),
        ("Accuracy", lambda run: _rate(run, "accuracy")),
        ("Accuracy before", lambda run: _single(run, "accuracy_before", percent)),
        ("Accuracy where chosen is shorter", lambda run: _rate(run, "accuracy_shorter")),
        (
            "Accuracy where chosen is shorter, before",
            lambda run: _single(run, "accuracy_shorter_before", percent),
        ),
        ("Accuracy of always preferring the longer", lambda run: _single(run, "longer_wins", percent)),
        ("Calibration error (ECE)", lambda run: _change(run, "ece", number)),
        ("Loss", lambda run: _change(run, "loss", number)),
        ("KL from before, nats per completion", lambda run: _single(run, "kl", number)),
        ("Mean length, tokens", lambda run: _change(run, "length", number)),
        ("Completions not truncated", lambda run: _change(run, "eos", percent)),
        ("Prompts compared", lambda run: _single(run, "compared", count)),
        ("Held-out pairs", lambda run: _single(run, "held_out_pairs", count)),
        ("Held-out pairs where chosen is shorter", lambda run: _single(run, "shorter_pairs", count)),
        ("Held-out demonstrations", lambda run: _single(run, "held_out", count)),
    ]
    table = [(label, tuple(cell(run) for run in runs)) for label, cell in rows]
    return [(label, cells) for label, cells in table if any(cells)]


def drawn_once(runs: Sequence[RunRecord]) -> Rows:
    """Return metrics of samples that were drawn once for all steps, if no run has a curve of them."""
    rows: Rows = []
    for panel in panels_of_one_value(runs):
        show = percent if panel.rate else number
        unit = "" if panel.rate or panel.unit == "reward" else f" {panel.unit}"
        values = [(line, f"{show(line.points[1][0])}{unit}") for line in panel.lines]
        if len(runs) == 1:
            rows += [(", ".join(filter(None, (panel.title, line.label))), (v,)) for line, v in values]
        else:
            cells = {line.style: value for line, value in values}
            rows.append((panel.title, tuple(cells.get(i, "") for i in range(len(runs)))))
    return rows


def interval_rows(runs: Sequence[RunRecord], name: str) -> list[Interval]:
    """Return the rates with intervals of the runs that have them, for a plot."""
    several = len(runs) > 1
    return [
        Interval(letter(i) if several else "after", *bounds, style=i)
        for i, run in enumerate(runs)
        if (bounds := _interval(run, name))
    ]


def unlike(runs: Sequence[RunRecord]) -> str:
    """Return the evaluation settings in which these runs differ, joined by commas; empty if none differ."""
    measured = [run for run in runs if _interval(run, "win_rate") or _interval(run, "accuracy")]
    return ", ".join(
        name for name in MEASURED_WITH if len({_shown(run.config.get(name)) for run in measured}) > 1
    )


def settings(runs: Sequence[RunRecord]) -> list[tuple[str, SettingRows]]:
    """Return tables with titles: the configuration, the use of the data, and the versions and machine."""
    used, data = [run.config for run in runs], _setting_rows([_data(run.description) for run in runs])
    places = [{"directory": str(run.directory), **_flat(run.description)} for run in runs]
    tables = {
        "configuration": _setting_rows(used),
        "data": data,
        "versions and machine": _setting_rows(places),
    }
    return [(title, rows) for title, rows in tables.items() if rows or title != "data"]


def _setting_rows(parts: Sequence[Mapping[str, Any]]) -> SettingRows:
    names = dict.fromkeys(name for part in parts for name in part)
    rows = []
    for name in names:
        cells = tuple(_shown(part.get(name)) for part in parts)
        rows.append((name, len(set(cells)) > 1, cells))
    return rows


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return all entries except the configuration and the use of the data, by dotted names."""
    entries: dict[str, Any] = {}
    for name, value in description.items():
        if name in ("config", "data"):
            continue
        if isinstance(value, dict):
            entries |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            entries[name] = moment(value) if name == "started" and isinstance(value, str) else value
    return entries


def _data(description: Mapping[str, Any]) -> dict[str, str]:
    """Return the account of each data set: rows read, used, skipped, left out, and what is not used."""
    entries: dict[str, str] = {}
    accounts = description.get("data")
    for source, account in accounts.items() if isinstance(accounts, dict) else ():
        if not isinstance(account, dict):
            continue
        for name, label in _ACCOUNT.items():
            value = account.get(name)
            if isinstance(value, dict):
                value = "; ".join(_entry(key, part) for key, part in value.items())
            if value not in (None, ""):
                entries[f"{source}: {label}"] = str(value)
    return entries


def _entry(key: str, value: Any) -> str:
    """Return one entry of an account: a length with its name, or a reason with its number of rows."""
    if isinstance(value, dict):
        value = (
            f"{value.get('rows')}, first {value.get('first')}" if value.get("first") else value.get("rows")
        )
        return f"{key} (rows: {value})"
    return f"{key}: {value}"


def _shown(value: object) -> str:
    """Return a value as it is written in a configuration; empty for None and empty values."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _interval(run: RunRecord, name: str) -> tuple[float, float, float] | None:
    """Return a rate with its lower and upper bound; None unless the run has all three."""
    rate = run.figure(name if name == "win_rate" else f"{name}_after")
    low, high = run.figure(f"{name}_low"), run.figure(f"{name}_high")
    return None if rate is None or low is None or high is None else (rate, low, high)


def _rate(run: RunRecord, name: str) -> str:
    bounds = _interval(run, name)
    return "" if bounds is None else f"{percent(bounds[0])} {interval(*bounds[1:])}"


def _change(run: RunRecord, name: str, show: Callable[[float], str]) -> str:
    ends: Iterable[float | None] = (run.figure(f"{name}_before"), run.figure(f"{name}_after"))
    texts = [show(value) for value in ends if value is not None]
    return ARROW.join(texts) if len(texts) == 2 else ""


def _single(run: RunRecord, name: str, show: Callable[[float], str]) -> str:
    value = run.figure(name)
    return "" if value is None else show(value)
