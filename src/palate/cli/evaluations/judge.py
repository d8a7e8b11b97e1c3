"""`palate evaluate judge`: measure an annotator on a file that `palate annotate` labelled."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from palate.cli.command import Command
from palate.config import Config, DataConfig


class JudgeEvaluationConfig(Config):
    """Evaluation"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}
    """Flags that are not named like their field."""
    data: str
    """File that `palate annotate` has labelled: pairs, whose own preference is the reference, or completions
    with a reference score."""
    split: str = DataConfig.model_fields["split"].default
    """Split of the data, for data with splits."""
    limit: int | None = Field(None, ge=1)
    """Number of rows to use, from the start. Default: all."""
    gold: str | None = None
    """Column with the reference score of a completion; higher is better. Default: `data_score`, the score
    that the data had before."""
    perfect: float = 5.0
    """Score that counts as perfect: 5 for a rubric."""
    html: Path | None = None
    """Write a page with the figures and the disagreements to this file."""
    json_only: bool = False
    """Print JSON and nothing else on stdout."""


def judge(config: JudgeEvaluationConfig) -> int:
    """Measure, then print the figures."""
    from palate.labelling import measure

    result, samples = measure(
        config.data, split=config.split, limit=config.limit, gold=config.gold, perfect=config.perfect
    )
    page = None
    if config.html is not None:
        from palate.report.judged import write_judge_page

        page = write_judge_page(result, samples, config.html.expanduser())
    if config.json_only:
        print(jsonlib.dumps(result))
        return 0
    _show(result, page)
    return 0


def _show(result: dict[str, Any], page: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from palate.report.judged import lead, table
    from palate.run import plain

    console = Console()
    head, rows = table(result)
    shown = Table(box=None, pad_edge=False, title=Text(plain(result["judge"])), title_justify="left")
    for i, name in enumerate(head):
        shown.add_column(name, justify="right" if i == 1 else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    console.print(shown)
    console.print(Text(plain(lead(result)), style="dim"), soft_wrap=True)
    if page is not None:
        console.print(Text(plain(f"page     {page}")), soft_wrap=True)


COMMAND = Command(
    name="judge",
    help="How good is an annotator? Accuracy, biases, calibration and cost, from a labelled file.",
    call=judge,
    config=JudgeEvaluationConfig,
    usage="Usage: palate evaluate judge --data LABELLED [OPTIONS]",
    order=3,
)
