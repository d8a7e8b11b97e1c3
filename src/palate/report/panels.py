"""Which curves a report draws, and the numbers of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from palate.metrics import METRICS, PART, STAGES
from palate.report.catalogue import PANELS, TRAINING, Curve, Line, Panel
from palate.rundir import RunRecord

MOST_OTHERS = 36
"""Curves of metrics that no panel names; a method may log any."""

_NOT_DRAWN = {name for name, metric in METRICS.items() if not metric.drawn}


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels that the runs have numbers for, with their lines.

    Of several runs, each panel has one line a run: a panel of several curves becomes several panels.
    """
    return [panel for panel in _all(runs) if not _once(panel)]


def panels_of_one_value(runs: Sequence[RunRecord]) -> list[Panel]:
    """Panels that have nothing but numbers of samples that were drawn once: no curves, but values."""
    return [panel for panel in _all(runs) if _once(panel)]


def _all(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    first, *rest = PANELS
    return (drawn for panel in (first, _parts(runs), *rest) for drawn in _drawn(panel, runs))


def _once(panel: Panel) -> bool:
    return all(line.once for line in panel.lines)


def other_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for every further metric that changes in a run."""
    curves = [curve for panel in (_parts(runs), *PANELS) for curve in panel.curves]
    named = {name for curve in curves for name in (curve.metric, curve.std, *(curve.bounds or ()))}
    rest = [n for n in _names(runs) if n not in named | _NOT_DRAWN and any(_changes(run, n) for run in runs)]
    shown = (Panel(f"other-{i}", name, "", "", (Curve(name),)) for i, name in enumerate(rest[:MOST_OTHERS]))
    return [drawn for panel in shown for drawn in _drawn(panel, runs)]


def _parts(runs: Sequence[RunRecord]) -> Panel:
    """Rewards that are weighed and added up, where there are several; methods log them by their own names."""
    names = [name for name in _names(runs) if name.startswith(PART)]
    curves = tuple(Curve(name, name.removeprefix(PART)) for name in names)
    return Panel(
        "parts", "Parts of the reward", "reward", "Each reward before it is weighed and added.", curves
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Every metric of the runs, in the order in which they came."""
    rows = (row for run in runs for row in (*run.rows, *run.measurements))
    return list(dict.fromkeys(name for row in rows for name in row))


def _changes(run: RunRecord, name: str) -> bool:
    return len(set(run.curve(name)[1])) > 1


def _drawn(panel: Panel, runs: Sequence[RunRecord]) -> Iterator[Panel]:
    if len(runs) == 1:
        lines = [replace(curve.read(runs[0]), style=i) for i, curve in enumerate(panel.curves)]
        kept = [line for line in lines if _worth(panel, line)]
        if len(kept) == 1 and kept[0].label == TRAINING:
            kept = [replace(kept[0], label="")]  # there is nothing to tell it from
        notes = [curve.band_note for curve, line in zip(panel.curves, lines, strict=True) if line.band]
        yield from _with(replace(panel, caption=" ".join((panel.caption, *notes))), kept)
        return
    there = [curve for curve in panel.curves if any(_worth(panel, curve.read(run)) for run in runs)]
    for curve in there:
        title = f"{panel.title}, {curve.label}" if curve.label and len(there) > 1 else panel.title
        lines = [replace(curve.read(run), label=letter(i), style=i, band=None) for i, run in enumerate(runs)]
        key = f"{panel.key}-{panel.curves.index(curve)}"
        yield from _with(replace(panel, key=key, title=title, curves=(curve,)), lines)


def _worth(panel: Panel, line: Line) -> bool:
    """Whether a line has something to show: reasons for which no pair was dropped do not."""
    return any(line.points[1]) if panel.key == "dead" else bool(line.points[0])


def _with(panel: Panel, lines: Iterable[Line]) -> Iterator[Panel]:
    """The panel with those of its lines that have points, if there are any."""
    found = tuple(line for line in lines if line.points[0])
    if found:
        yield replace(panel, lines=found)


def letter(index: int) -> str:
    """A, B, ... Z, AA, ...: what a run is called in plots."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def stage_seconds(run: RunRecord) -> dict[str, float]:
    """Seconds of all steps together by stage, in the stages' order, and what no stage accounts for."""
    seconds = {label: sum(run.curve(f"time/{stage}")[1]) for stage, label in STAGES.items()}
    rest = sum(run.curve("step_time")[1]) - sum(seconds.values())
    return {label: spent for label, spent in {**seconds, "other": max(0.0, rest)}.items() if spent > 0}
