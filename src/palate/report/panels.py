"""Select the panels of a report and read their lines from the runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from palate.metrics import METRICS, PART, STAGES
from palate.report.catalogue import PANELS
from palate.report.curves import TRAINING, Curve, Line, Panel
from palate.rundir import RunRecord

MOST_OTHERS = 36
"""Most plots under "Further metrics": metrics without a panel of their own; a method may log any."""

_NOT_DRAWN = {name for name, metric in METRICS.items() if not metric.drawn}


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the panels that the runs have numbers for, with their lines.

    With several runs, a panel has one line per run, and a panel of several curves becomes several panels.
    """
    return [panel for panel in _all(runs) if not _once(panel)]


def panels_of_one_value(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return the panels whose metrics have a single value, because the samples were drawn once."""
    return [panel for panel in _all(runs) if _once(panel)]


def _all(runs: Sequence[RunRecord]) -> Iterator[Panel]:
    first, *rest = PANELS
    return (drawn for panel in (first, _parts(runs), *rest) for drawn in _drawn(panel, runs))


def _once(panel: Panel) -> bool:
    return all(line.once for line in panel.lines)


def other_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """Return a panel for each remaining metric that changes during a run."""
    curves = [curve for panel in (_parts(runs), *PANELS) for curve in panel.curves]
    named = {name for curve in curves for name in (curve.metric, curve.std, *(curve.bounds or ()))}
    rest = [n for n in _names(runs) if n not in named | _NOT_DRAWN and any(_changes(run, n) for run in runs)]
    shown = (Panel(f"other-{i}", name, "", "", (Curve(name),)) for i, name in enumerate(rest[:MOST_OTHERS]))
    return [drawn for panel in shown for drawn in _drawn(panel, runs)]


def _parts(runs: Sequence[RunRecord]) -> Panel:
    """Return the panel for the parts of a weighted sum of rewards. Each part is logged under its own name."""
    names = [name for name in _names(runs) if name.startswith(PART)]
    curves = tuple(Curve(name, name.removeprefix(PART)) for name in names)
    return Panel(
        "parts", "Parts of the reward", "reward", "Each reward before it is weighted and added.", curves
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of all metrics of the runs, in order of first appearance."""
    rows = (row for run in runs for row in (*run.rows, *run.measurements))
    return list(dict.fromkeys(name for row in rows for name in row))


def _changes(run: RunRecord, name: str) -> bool:
    return len(set(run.curve(name)[1])) > 1


def _drawn(panel: Panel, runs: Sequence[RunRecord]) -> Iterator[Panel]:
    if len(runs) == 1:
        lines = [replace(curve.read(runs[0]), style=i) for i, curve in enumerate(panel.curves)]
        kept = [line for line in lines if _worth(panel, line)]
        if len(kept) == 1 and kept[0].label == TRAINING:
            kept = [replace(kept[0], label="")]  # a single line needs no label
        notes = [curve.band_note for curve, line in zip(panel.curves, lines, strict=True) if line.band]
        yield from _with(replace(panel, caption=" ".join((panel.caption, *notes))), kept)
        return
    drawable = [curve for curve in panel.curves if any(_worth(panel, curve.read(run)) for run in runs)]
    for curve in drawable:
        title = f"{panel.title}, {curve.label}" if curve.label and len(drawable) > 1 else panel.title
        lines = [replace(curve.read(run), label=letter(i), style=i, band=None) for i, run in enumerate(runs)]
        key = f"{panel.key}-{panel.curves.index(curve)}"
        yield from _with(replace(panel, key=key, title=title, curves=(curve,)), lines)


def _worth(panel: Panel, line: Line) -> bool:
    """Return True for a line with points; in the panel of unusable groups, also some value must not be 0."""
    return any(line.points[1]) if panel.key == "dead" else bool(line.points[0])


def _with(panel: Panel, lines: Iterable[Line]) -> Iterator[Panel]:
    """Yield the panel with those of its lines that have points; nothing if no line has points."""
    drawable = tuple(line for line in lines if line.points[0])
    if drawable:
        yield replace(panel, lines=drawable)


def letter(index: int) -> str:
    """Return the letter of a run in plots: A, B, ... Z, AA, ..."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def stage_seconds(run: RunRecord) -> dict[str, float]:
    """Return the seconds of all steps by stage, in order; `other` is the time outside all stages."""
    seconds = {label: sum(run.curve(f"time/{stage}")[1]) for stage, label in STAGES.items()}
    rest = sum(run.curve("step_time")[1]) - sum(seconds.values())
    return {label: spent for label, spent in {**seconds, "other": max(0.0, rest)}.items() if spent > 0}
