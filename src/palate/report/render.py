"""Render run directories as one self-contained HTML file."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from palate.errors import RunError
from palate.report import plots
from palate.report.curves import Panel
from palate.report.panels import letter, other_panels, panels, stage_seconds
from palate.report.samples import chunked, left_out, shown
from palate.report.sign import Sign
from palate.report.signs import SIGNS, signs
from palate.report.tables import Figure, drawn_once, figures, held_out, interval_rows, settings, unlike
from palate.report.words import (
    best_figures,
    count,
    duration,
    how_it_ended,
    unmeasured,
    unsampled,
    what_was_run,
)
from palate.run import plain
from palate.rundir import RunRecord, read_runs, run_names

HERE = Path(__file__).parent

LONGEST_NAME = 200
"""Most bytes of runs' names in the name of a file; file systems allow 255."""


@dataclass(frozen=True)
class View:
    """The texts and figures of a run at the head of the page."""

    name: str
    letter: str
    swatches: tuple[Markup, ...]
    """One for the head and one for the legend, since an id may occur only once in a page."""
    state: str
    sentence: str
    figures: tuple[Figure, ...]
    directory: str


@dataclass(frozen=True)
class Drawn:
    """A plot with its title and caption."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True)
class Times:
    """Time by stage: the plot, and rows of a stage, its swatch and the time in each run."""

    svg: Markup
    rows: tuple[tuple[str, Markup, tuple[str, ...]], ...]


def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write a report on one run, or on several side by side, as a single HTML file.

    The file contains its style, script and plots, and loads nothing from elsewhere.

    Args:
        runs: directories of runs, finished or not.
        output: the file to write. Default: `report.html` in a single run's directory, and `report-A-B.html`
            in the deepest directory that has all of several runs. An existing file is replaced.

    Returns:
        The path of the report.

    Raises:
        RunError: no run is given, or one is given twice; a directory is not a run; a file cannot be read or
            written.
    """
    records = read_runs(runs)
    target = _default_output([record.directory for record in records]) if output is None else output
    page = render(records)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8", newline="\n")
        os.replace(part, target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RunError(
            f"the report {str(target)!r} cannot be written: {error.strerror or error}; "
            "choose another file with --output"
        ) from None
    return target


def _default_output(directories: Sequence[Path]) -> Path:
    """Return the file for a report on some runs; a comparison must not replace a run's own report."""
    if len(directories) == 1:
        return directories[0] / "report.html"
    names = "-".join(run_names(directories)).replace("/", "-").replace(os.sep, "-")
    if len(names.encode()) > LONGEST_NAME:
        names = f"{names[: LONGEST_NAME // 4]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    common = Path(os.path.commonpath([directory.resolve().parent for directory in directories]))
    shown = Path(os.path.relpath(common)) if common.is_relative_to(Path.cwd()) else common
    return shown / f"report-{names}.html"


def render(records: Sequence[RunRecord]) -> str:
    """Return the HTML page for some runs."""
    views = _views(records)
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    samples = [shown(record, i) for i, record in enumerate(records)]
    context: dict[str, Any] = {
        "views": views,
        "several": len(views) > 1,
        "title": views[0].name if len(views) == 1 else f"{len(views)} runs",
        "version": importlib.metadata.version("palate"),
        "style": style,
        "style_hash": style_hash(style),
        "script": script,
        "script_hash": style_hash(script),
        "signs": _signs(records, views),
        "looked_for": len(SIGNS),
        "unread": list(_unread(records, views)),
        "held_out": held_out(records),
        "unlike": unlike(records),
        "intervals": _intervals(records),
        "plots": [_drawn(panel) for panel in panels(records)],
        "others": [_drawn(panel) for panel in other_panels(records)],
        "window": plots.WINDOW,
        "times": _times(records),
        "chunks": chunked([sample for part in samples for sample in part]),
        "left_out": left_out(records),
        "settings": settings(records),
        "rounds": not all(record.fresh for record in records),
        "drawn_once": drawn_once(records),
        "unmeasured": unmeasured(records),
        "unsampled": unsampled(records),
        "unfinished": any(record.status.state != "finished" for record in records),
    }
    return environment().get_template("template.html.j2").render(context)


def environment() -> Environment:
    """Return a Jinja environment that escapes all values and makes control characters visible."""

    def visible(value: object) -> object:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    return Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def style_hash(text: str) -> str:
    """Return the hash of an inline style or script for the page's content security policy."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _views(records: Sequence[RunRecord]) -> list[View]:
    names = run_names([record.directory for record in records])
    several = len(records) > 1
    return [
        View(
            name=name,
            letter=letter(i),
            swatches=tuple(plots.swatch(i, f"{place}-{i}") for place in ("run", "legend") if several),
            state=record.status.state,
            sentence=" ".join(
                filter(None, (what_was_run(record), how_it_ended(record), best_figures(record)))
            ),
            figures=figures(record),
            directory=str(record.directory),
        )
        for i, (name, record) in enumerate(zip(names, records, strict=True))
    ]


def _signs(records: Sequence[RunRecord], views: Sequence[View]) -> list[tuple[Sign, list[tuple[View, str]]]]:
    """Return the signs of all runs, worries first. A sign of several runs appears once, with all numbers."""
    seen: dict[Sign, list[tuple[View, str]]] = {}
    for view, record in zip(views, records, strict=True):
        for sign in signs(record):
            seen.setdefault(replace(sign, seen=""), []).append((view, sign.seen))
    return sorted(seen.items(), key=lambda item: item[0].level != "worry")


def _unread(records: Sequence[RunRecord], views: Sequence[View]) -> Iterator[tuple[View, str]]:
    for view, record in zip(views, records, strict=True):
        for name, lines in record.unread.items():
            yield view, f"{count(lines)} {'line' if lines == 1 else 'lines'} of {name} could not be read."


def _drawn(panel: Panel) -> Drawn:
    return Drawn(panel.title, panel.caption, plots.curves(panel))


def _intervals(records: Sequence[RunRecord]) -> list[Drawn]:
    drawn = []
    for key, title, name in (
        ("interval-win", "Win rate against the model before", "win_rate"),
        ("interval-accuracy", "Held-out accuracy", "accuracy"),
        ("interval-shorter", "Held-out accuracy where chosen is shorter", "accuracy_shorter"),
    ):
        if rows := interval_rows(records, name):
            drawn.append(Drawn(title, "", plots.intervals(rows, key, title)))
    return drawn


def _times(records: Sequence[RunRecord]) -> Times | None:
    spent = [stage_seconds(record) for record in records]
    stages = list(dict.fromkeys(stage for parts in spent for stage in parts))
    if not stages:
        return None
    bars = {letter(i) if len(records) > 1 else "": parts for i, parts in enumerate(spent) if parts}
    rows = []
    for i, stage in enumerate(stages):
        cells = (f"{duration(parts[stage])}" if stage in parts else "" for parts in spent)
        rows.append((stage, plots.patch(i, f"stage-{i}"), tuple(cells)))
    return Times(plots.bars(bars, stages, "times", "Time by stage"), tuple(rows))
