"""`palate evaluate export`: outputs of an evaluation for AlpacaEval or lm-evaluation-harness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from palate.cli.command import Command
from palate.errors import ConfigError
from palate.rundir import read_description


def export(
    evaluation: Annotated[
        Path | None, Parameter(help="Directory of an evaluation.", show_default=False)
    ] = None,
    /,
    *,
    form: Annotated[
        Literal["alpaca-eval", "lm-eval"],
        Parameter(
            name="--format", help="`model_outputs.json` of AlpacaEval, or results and samples of lm-eval."
        ),
    ] = "alpaca-eval",
    output: Annotated[
        Path | None,
        Parameter(help="Folder to write to. Default: `export` in the evaluation.", show_default=False),
    ] = None,
) -> int:
    """Write the files and print their paths."""
    if evaluation is None:
        raise ConfigError("no evaluation is given; write `palate evaluate export DIRECTORY`")
    directory = evaluation.expanduser()
    read_description(directory)
    from palate.evaluation.export import export as write

    for path in write(directory, (output or directory / "export").expanduser(), form):
        print(path)
    return 0


COMMAND = Command(
    name="export",
    help="Write the outputs of an evaluation for AlpacaEval or lm-eval.",
    call=export,
    usage="Usage: palate evaluate export EVALUATION [OPTIONS]",
    order=4,
)
