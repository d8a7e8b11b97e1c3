"""Figures and tables of a report: cells of text, one for each run."""

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
"""Settings that held-out figures depend on besides the training: where these differ, runs do not compare."""

Rows = list[tuple[str, tuple[str, ...]]]
SettingRows = list[tuple[str, bool, tuple[str, ...]]]


class Figure(NamedTuple):
    """A number at the head of the page."""

    label: str
    value: str
    detail: str = ""


def figures(run: RunRecord) -> tuple[Figure, ...]:
    """The few numbers of a run that say most; those that it has."""
    found = []
    for label, name, of, how in (
        ("Win rate", "win_rate", "compared", " on {} prompts"),
        ("Held-out accuracy", "accuracy", "held_out_pairs", "; {} pairs, by prompts"),
    ):
        if bounds := _interval(run, name):
            rate, low, high = bounds
            compared = run.figure(of)
            on = "" if compared is None else how.format(count(compared))
            found.append(Figure(label, percent(rate), f"{interval(low, high)}{on}"))
    before, after = run.figure("reward_before"), run.figure("reward_after")
    if before is not None and after is not None:
        found.append(
            Figure("Mean reward", number(after), f"{signed(after - before, 3)} from {number(before)}")
        )
    if (kl := run.figure("kl")) is not None:
        found.append(Figure("KL to the start", number(kl), "nats per completion"))
    before, after = run.figure("length_before"), run.figure("length_after")
    if before is not None and after is not None:
        found.append(Figure("Mean length", number(after), f"tokens, {number(before)} before"))
    for label, name in (("Held-out loss", "loss"), ("Calibration error", "ece")):
        before, after = run.figure(f"{name}_before"), run.figure(f"{name}_after")
        if before is not None and after is not None:
            found.append(Figure(label, number(after), f"{number(before)} before"))
    if found and run.status.seconds:
        found.append(Figure("Time", duration(run.status.seconds), f"{count(run.status.step)} steps"))
    return tuple(found)


def held_out(runs: Sequence[RunRecord]) -> Rows:
    """Held-out figures: a row for each that any of the runs has."""
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("Win rate over the start", lambda run: _rate(run, "win_rate")),
        ("Mean reward", lambda run: _change(run, "reward", number)),
        ("Pairs ranked as the data do", lambda run: _rate(run, "accuracy")),
        ("the same, before", lambda run: _single(run, "accuracy_before", percent)),
        ("where the shorter is better", lambda run: _rate(run, "accuracy_shorter")),
        ("where the shorter is better, before", lambda run: _single(run, "accuracy_shorter_before", percent)),
        ("ranked so by preferring the longer", lambda run: _single(run, "longer_wins", percent)),
        ("Calibration error (ECE)", lambda run: _change(run, "ece", number)),
        ("Loss", lambda run: _change(run, "loss", number)),
        ("KL, nats per completion", lambda run: _single(run, "kl", number)),
        ("Length, tokens", lambda run: _change(run, "length", number)),
        ("Ended by itself", lambda run: _change(run, "eos", percent)),
        ("Prompts compared", lambda run: _single(run, "compared", count)),
        ("Held-out pairs", lambda run: _single(run, "held_out_pairs", count)),
        ("in which the shorter is better", lambda run: _single(run, "shorter_pairs", count)),
        ("Held-out demonstrations", lambda run: _single(run, "held_out", count)),
    ]
    table = [(label, tuple(cell(run) for run in runs)) for label, cell in rows]
    return [(label, cells) for label, cells in table if any(cells)]


def drawn_once(runs: Sequence[RunRecord]) -> Rows:
    """Numbers of samples that were drawn once for all steps, where no run has a curve of them."""
    found: Rows = []
    for panel in panels_of_one_value(runs):
        show = percent if panel.rate else number
        unit = "" if panel.rate or panel.unit == "reward" else f" {panel.unit}"
        values = [(line, f"{show(line.points[1][0])}{unit}") for line in panel.lines]
        if len(runs) == 1:
            found += [(", ".join(filter(None, (panel.title, line.label))), (v,)) for line, v in values]
        else:
            cells = {line.style: value for line, value in values}
            found.append((panel.title, tuple(cells.get(i, "") for i in range(len(runs)))))
    return found


def interval_rows(runs: Sequence[RunRecord], name: str) -> list[Interval]:
    """The rates of the runs that have one, for a plot."""
    several = len(runs) > 1
    return [
        Interval(letter(i) if several else "after", *bounds, style=i)
        for i, run in enumerate(runs)
        if (bounds := _interval(run, name))
    ]


def unlike(runs: Sequence[RunRecord]) -> str:
    """The settings by which held-out figures of these runs measure different things; empty if none."""
    measured = [run for run in runs if _interval(run, "win_rate") or _interval(run, "accuracy")]
    return ", ".join(
        name for name in MEASURED_WITH if len({_shown(run.config.get(name)) for run in measured}) > 1
    )


def settings(runs: Sequence[RunRecord]) -> list[tuple[str, SettingRows]]:
    """Tables of configuration, and of versions and machine."""
    used = [run.config for run in runs]
    places = [{"directory": str(run.directory), **_flat(run.description)} for run in runs]
    return [("configuration", _setting_rows(used)), ("versions and machine", _setting_rows(places))]


def _setting_rows(parts: Sequence[Mapping[str, Any]]) -> SettingRows:
    names = dict.fromkeys(name for part in parts for name in part)
    found = []
    for name in names:
        cells = tuple(_shown(part.get(name)) for part in parts)
        found.append((name, len(set(cells)) > 1, cells))
    return found


def _flat(description: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but the configuration, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in description.items():
        if name == "config":
            continue
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": part for inner, part in value.items()}
        else:
            found[name] = moment(value) if name == "started" and isinstance(value, str) else value
    return found


def _shown(value: object) -> str:
    """A value as it is written in a configuration; empty for none."""
    if value is None or value == [] or value == {}:
        return ""
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ", ".join(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _interval(run: RunRecord, name: str) -> tuple[float, float, float] | None:
    """Rate, low and high, if the run has all three."""
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
