"""`palate report`: write an HTML report on one or more runs, and open it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from palate.cli.command import Command
from palate.errors import ConfigError, RunError
from palate.rundir import read_description


def report(
    *run: Annotated[Path, Parameter(help="Directories of runs.", negative=())],
    output: Annotated[
        Path | None,
        Parameter(
            metavar="FILE",
            help="File to write. Default: report.html in the run's directory; for several runs A and B, "
            "report-A-B.html in the directory that has both.",
        ),
    ] = None,
    show: Annotated[
        bool, Parameter(name="--open", negative=(), help="Open the report in a browser.", show_default=False)
    ] = False,
) -> int:
    """Write a report and print its path."""
    if not run:
        raise ConfigError("no run is given; write `palate report RUN`, such as `palate report runs/oaif`")
    runs = [directory.expanduser() for directory in run]
    for directory in runs:
        read_description(directory)  # a wrong directory is reported before the plotting libraries load

    import webbrowser

    from rich.console import Console
    from rich.text import Text

    from palate.report import write_report
    from palate.run.display import plain

    try:
        path = write_report(runs, None if output is None else output.expanduser())
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror or error}") from error
    Console().print(Text(plain(str(path))), soft_wrap=True)
    if show and not webbrowser.open(path.resolve().as_uri()):
        raise RunError(f"no browser could be opened; open {str(path)!r} yourself")
    return 0


COMMAND = Command(
    name="report",
    help="Write a report on one run, or compare several runs.",
    call=report,
    usage="Usage: palate report RUN... [OPTIONS]",
    order=4,
)
