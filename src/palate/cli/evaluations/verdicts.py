"""`palate evaluate verdicts`: win rates of a file of verdicts."""

from __future__ import annotations

import json as jsonlib
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

from cyclopts import Parameter

from palate.cli.command import Command, Json
from palate.errors import ConfigError, DataError
from palate.winrates import Verdict, discrete_win_rate, length_controlled, standard_error, win_rate

FIELDS = ("preference", "length", "baseline_length")

LONGEST = 2.0**53
"""Largest length. Beyond it, differences of lengths are no longer exact, and their squares may overflow."""


def verdicts(
    file: Annotated[Path | None, Parameter(help="JSON lines, or gzip of them.", show_default=False)] = None,
    /,
    *,
    json: Json = False,
) -> int:
    """Print win rates in percent."""
    if file is None:
        raise ConfigError("no file is given; write `palate evaluate verdicts FILE`")
    numbers = measured(read_verdicts(file.expanduser()))
    if json:
        print(
            jsonlib.dumps({name: value if math.isfinite(value) else None for name, value in numbers.items()})
        )
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in numbers.items():
        shown = f"{value:.0f}" if name == "verdicts" else f"{value:.2f}"
        table.add_row(name.replace("_", " ") + ("" if name == "verdicts" else ", %"), shown)
    Console().print(table)
    return 0


def measured(rows: list[Verdict]) -> dict[str, float]:
    """Return the numbers of a file: win rates and standard errors in percent, and the number of verdicts."""
    preferences = [row.preference for row in rows]
    controlled = length_controlled(rows)
    return {
        "win_rate": 100 * win_rate(preferences),
        "standard_error": 100 * standard_error(preferences),
        "discrete_win_rate": 100 * discrete_win_rate(preferences),
        "length_controlled_win_rate": 100 * controlled.rate,
        "length_controlled_standard_error": 100 * controlled.standard_error,
        "verdicts": len(rows),
    }


def read_verdicts(file: Path) -> list[Verdict]:
    """Read a file of verdicts.

    Raises:
        DataError: the file cannot be read, has no verdicts, or a line is not a verdict.
    """
    try:
        with _opened(file) as lines:
            rows = [_verdict(line, f"{file}:{at}") for at, line in enumerate(lines, 1) if line.strip()]
    except FileNotFoundError:
        raise DataError(
            f"{str(file)!r} does not exist; expected a file of verdicts, one JSON object a line"
        ) from None
    except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{str(file)!r} cannot be read: {reason}; expected JSON lines in UTF-8") from None
    if not rows:
        raise DataError(f"{str(file)!r} has no verdicts; expected one JSON object a line with {_fields()}")
    return rows


def _opened(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        import gzip

        return gzip.open(file, "rt", encoding="utf-8-sig")
    return file.open(encoding="utf-8-sig")


def _verdict(line: str, where: str) -> Verdict:
    try:
        row = jsonlib.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}; expected an object with {_fields()}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where} is not a JSON object; expected an object with {_fields()}")
    return Verdict(*_numbers(row, where))


def _numbers(row: dict[str, Any], where: str) -> Iterator[float]:
    for name in FIELDS:
        value = row.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            was = f"is {value!r}" if name in row else "is missing"
            raise DataError(f"{where}: {name} {was}, expected a number; every line needs {_fields()}")
        shown = str(value) if abs(value) <= LONGEST else "out of range"
        if name == "preference" and not 0 <= value <= 1:
            raise DataError(f"{where}: preference is {shown}, expected P(model preferred) between 0 and 1")
        if name != "preference" and not 0 <= value <= LONGEST:
            raise DataError(f"{where}: {name} is {shown}, expected a length between 0 and 2^53")
        yield float(value)


def _fields() -> str:
    return ", ".join(FIELDS[:-1]) + f" and {FIELDS[-1]}"


COMMAND = Command(
    name="verdicts",
    help="Win rates, also length-controlled, of a file of verdicts.",
    call=verdicts,
    usage="Usage: palate evaluate verdicts FILE [OPTIONS]",
    order=2,
)
