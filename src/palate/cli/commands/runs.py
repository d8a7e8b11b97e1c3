"""`palate runs`: list the runs in a directory with their progress and results."""

from __future__ import annotations

import json as jsonlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from palate.cli.command import Command, Json
from palate.errors import PalateError, RunError
from palate.metrics import label
from palate.run.display import plain
from palate.rundir import (
    UNREADABLE,
    holds_run,
    latest_numbers,
    read_description,
    read_status,
    read_summary,
)

WHERE = Path("runs")

ROOMY = 120
"""The terminal width, in columns, from which the start time is shown."""

STYLES = {
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "failed": "red",
    "killed": "red",
    "unknown": "dim",
    "unreadable": "magenta",
}
STOPPED = ("interrupted", "failed", "killed")
"""States of a run that can be resumed with the same command."""

RESULTS = ("reward_before", "reward_after", "win_rate", "win_rate_low", "win_rate_high",
           "accuracy_before", "accuracy_after", "accuracy_low", "accuracy_high")  # fmt: skip
"""Numbers in `summary.json`."""
LATEST = ("objective/scores", "eval_rewards/accuracies", "rewards/accuracies", "loss")
"""Metrics shown for a run without a summary, in order of preference."""


@dataclass(frozen=True)
class Listed:
    """One row of the list of runs. Unknown values are None; `figures` has the known results by name."""

    run: str
    state: str
    """One of the keys of `STYLES`."""
    reason: str = ""
    """The error, for a run that failed or cannot be read."""
    method: str | None = None
    step: int | None = None
    steps: int | None = None
    started: str | None = None
    updated: str | None = None
    seconds: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    age: float = field(default=0.0, compare=False)
    """Seconds since the run started; the list is sorted by it."""


def runs(
    directory: Annotated[
        Path | None, Parameter(help="Directory with runs. Default: `runs`.", show_default=False)
    ] = None,
    /,
    *,
    json: Json = False,
) -> int:
    """List the runs in a directory, newest first."""
    where = directory or WHERE
    if directory is not None and not where.is_dir():
        problem = "is a file" if where.exists() else "does not exist"
        raise RunError(f"{str(where)!r} {problem}; expected a directory with runs in it")
    rows = listed(where)
    if json:
        objects = [{k: v for k, v in asdict(row).items() if k != "age"} for row in rows]
        print(jsonlib.dumps(objects, indent=2))  # in ASCII: a directory may have any name
        return 0
    if not rows:
        Console(stderr=True).print(Text(f"no runs in {plain(str(where))!r}"), soft_wrap=True)
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = 1 << 12  # one line per run, for programs that read the output
    show(rows, console)
    return 0


def listed(directory: Path) -> list[Listed]:
    """Return the runs in a directory and in its subdirectories, or the directory itself; newest first."""
    return sorted((_read(path) for path in _runs_in(directory)), key=lambda row: (row.age, row.run))


def show(rows: list[Listed], console: Console) -> None:
    """Print the table of runs, then the errors of failed runs and how to resume."""
    table = Table(box=None, pad_edge=False)
    columns = ["run", "method", "state", "step", "started", "updated", "result"]
    if console.width < ROOMY:
        columns.remove("started")
    for column in columns:
        justify: Literal["left", "right"] = "right" if column == "step" else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in ("run", "result"))
    for row in rows:
        cells = {
            "run": Text(plain(row.run)),
            "method": Text(plain(row.method or "")),
            "state": Text(row.state, style=STYLES[row.state]),
            "step": Text(_progress(row)),
            "started": Text(plain(_minute(row.started))),
            "updated": Text(plain(_minute(row.updated))),
            "result": Text(_result(row.figures)),
        }
        table.add_row(*(cells[column] for column in columns))
    console.print(table)
    for row in rows:
        if row.reason:
            line = Text.assemble((f"{plain(row.run)} {row.state}: ", STYLES[row.state]), plain(row.reason))
            console.print(line, soft_wrap=True)
    if any(row.state in STOPPED for row in rows):
        text = "To resume a run that stopped early, repeat its command (without --overwrite)."
        console.print(Text(text, style="dim"), soft_wrap=True)


def _runs_in(directory: Path) -> Iterator[Path]:
    """Yield the directory if it is a run; else its folders that are runs, and the runs in other folders."""
    if holds_run(directory):
        yield directory
        return
    for path in _folders(directory):
        if holds_run(path):
            yield path
        else:
            yield from filter(holds_run, _folders(path))


def _folders(directory: Path) -> list[Path]:
    """Return the folders in a directory, sorted, without hidden ones: these hold runs being replaced."""
    try:
        return sorted(p for p in directory.iterdir() if not p.name.startswith(".") and p.is_dir())
    except OSError:
        return []


def _read(directory: Path) -> Listed:
    name = str(directory)
    try:
        description = read_description(directory)
        summary, latest = read_summary(directory) or {}, latest_numbers(directory)
        figures = _numbers(summary, RESULTS) or dict(list(_numbers(latest, LATEST).items())[:1])
        started = description.get("started") if isinstance(description.get("started"), str) else None
        known: dict[str, Any] = {"method": description["method"], "started": started, "figures": figures}
        known["age"] = _age(started, directory)
        if not (directory / "status.json").exists():
            step, steps = _whole(latest.get("step")), _whole(description["config"].get("steps"))
            return Listed(name, "unknown", step=step, steps=steps, **known)
        status = read_status(directory)
        known |= {"step": _whole(status.step), "steps": _whole(status.steps) or None}
        known |= {"updated": str(status.updated) or None, "seconds": _finite(status.seconds)}
        return Listed(name, status.state, _line(status.reason), **known)
    except UNREADABLE as error:
        reason = str(error) if isinstance(error, PalateError) else f"{type(error).__name__}: {error}"
        return Listed(name, "unreadable", _line(reason), age=_age(None, directory))


def _age(started: str | None, directory: Path) -> float:
    """Return the seconds since the recorded start, or else since the directory was last changed."""
    if started is not None:
        try:
            return time.time() - datetime.fromisoformat(started).timestamp()
        except (ValueError, OverflowError):
            pass
    try:
        return time.time() - directory.stat().st_mtime
    except OSError:
        return math.inf


def _numbers(values: Mapping[str, Any], names: Any) -> dict[str, float]:
    pairs = ((name, _finite(values.get(name))) for name in names)
    return {name: number for name, number in pairs if number is not None}


def _finite(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return value if abs(value) < 1e300 else None  # JSON can hold integers too large for a float


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _line(text: Any) -> str:
    return " ".join(str(text).split())


def _progress(row: Listed) -> str:
    if row.step is None:
        return ""
    return str(row.step) if row.steps is None else f"{row.step}/{row.steps}"


def _minute(stamp: str | None) -> str:
    """Return an ISO time as `2026-01-31 12:05`; any other text is truncated to the same length."""
    return (stamp or "").replace("T", " ", 1)[:16]


def _result(figures: Mapping[str, float]) -> str:
    parts = [_change("reward", figures), _change("accuracy", figures)]
    if "win_rate" in figures:
        parts.insert(1, f"win rate {figures['win_rate']:.2f}{_interval('win_rate', figures)}")
    parts += [f"{label(name)} {figures[name]:.3f}" for name in LATEST if name in figures]
    return ", ".join(filter(None, parts))


def _change(name: str, figures: Mapping[str, float]) -> str:
    if not {f"{name}_before", f"{name}_after"} <= figures.keys():
        return ""
    before, after = figures[f"{name}_before"], figures[f"{name}_after"]
    return f"{name} {before:.3f} -> {after:.3f}{_interval(name, figures)}"


def _interval(name: str, figures: Mapping[str, float]) -> str:
    """Return the 95 % interval as text; empty if it is unknown."""
    if not {f"{name}_low", f"{name}_high"} <= figures.keys():
        return ""
    return f" [{figures[f'{name}_low']:.2f}, {figures[f'{name}_high']:.2f}]"


COMMAND = Command(
    name="runs",
    help="List runs with their progress and results.",
    call=runs,
    usage="Usage: palate runs [DIRECTORY] [OPTIONS]",
    order=3,
)
