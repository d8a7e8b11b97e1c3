"""`palate evaluate models`, also written `palate evaluate --model A`: measure models on held-out prompts."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import ClassVar

from palate.cli.command import Command
from palate.evaluation.config import EvaluateConfig


class ModelsConfig(EvaluateConfig):
    """Evaluation"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}
    """Flags that are not named like their field."""
    json_only: bool = False
    """Print JSON and nothing else on stdout."""


def models(config: ModelsConfig) -> int:
    """Measure, then print the table and the paths of the files."""
    from rich.console import Console

    from palate.evaluation import evaluate
    from palate.quiet import quiet_libraries
    from palate.run import Display, plain

    quiet_libraries()
    cfg = config.part(EvaluateConfig)
    done = evaluate(cfg, display=Display(quiet=config.json_only))
    from palate.report.evaluated import notes, table, write_evaluation

    page = write_evaluation(done.result, done.samples, done.directory / "report.html")
    if config.json_only:
        print(jsonlib.dumps(done.result))
        return 0
    from rich.table import Table
    from rich.text import Text

    console = Console()
    head, rows = table(done.result)
    shown = Table(box=None, pad_edge=False)
    for i, name in enumerate(head):
        shown.add_column(Text(plain(name)), justify="right" if i else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(plain(cell)) for cell in row))
    console.print()
    console.print(shown)
    for note in notes(done.result):
        console.print(Text(plain(note), style="dim"), soft_wrap=True)
    console.print(Text(plain(f"\nresults  {done.directory / 'summary.json'}")), soft_wrap=True)
    console.print(Text(plain(f"page     {page}")), soft_wrap=True)
    return 0


COMMAND = Command(
    name="models",
    help="Measure models on held-out prompts: win rates, reward, KL, lengths, variety.",
    call=models,
    config=ModelsConfig,
    usage="Usage: palate evaluate --model MODEL [--against MODEL|data] [OPTIONS]",
    order=1,
)
