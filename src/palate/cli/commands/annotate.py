"""`palate annotate DATA`: label data with a judge or a reward."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from palate.cli.command import Command
from palate.config import DataConfig, ModelConfig, RewardConfig, Source
from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.labelling import Counts


class AnnotateConfig(RewardConfig, ModelConfig, DataConfig):
    """Annotate"""

    unoffered: ClassVar = frozenset(
        ModelConfig.model_fields.keys() - {"device", "trust_remote_code", "fast"}
        | {"data", "eval_data", "eval_split", "eval_limit", "fresh_prompts", "eval_reward"}
        | {"probe_pairs", "probe_data"}
    )
    """`data` is the first word; the others have no use without training."""
    flags: ClassVar[Mapping[str, str]] = {"json_lines": "--json"}
    """Flags that are not named like their field."""
    data: Source
    """Data to label, as in a run: pairs with chosen and rejected, or prompts with a completion."""
    output: Path | None = None
    """File to write, .parquet or .jsonl. It appears when it is complete. Verdicts are stored in a file beside
    it as soon as they arrive; the same command again resumes and never pays twice."""
    pairs: bool = False
    """Make one pair of each prompt with several completions: the best against the worst."""
    seed: int = Field(0, ge=0)
    """Seed of label_noise."""
    json_lines: bool = False
    """Print the counts as one JSON object and nothing else on stdout."""


def annotate(config: AnnotateConfig) -> int:
    """Label the data, then print the counts."""
    if config.output is None:
        raise ConfigError("output is missing; give --output FILE, a .parquet or .jsonl file")

    from rich.console import Console
    from rich.progress import Progress

    from palate.labelling import label
    from palate.quiet import quiet_libraries
    from palate.run import plain

    quiet_libraries()
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("annotate", total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        counts = label(
            config.part(DataConfig),
            config.part(RewardConfig),
            config.output.expanduser(),
            pairs=config.pairs,
            seed=config.seed,
            options={name: getattr(config, name) for name in ("device", "trust_remote_code", "fast")},
            say=lambda text: bar.console.print(plain(text), markup=False, highlight=False, soft_wrap=True),
            progress=show,
        )
    if config.json_lines:
        print(jsonlib.dumps(counts.numbers()))
    else:
        sys.stdout.write("\n".join(_lines(counts)) + "\n")
    return 0


def _lines(counts: Counts) -> list[str]:
    """Return the counts in words."""
    rows = f"{counts.rows:,} rows in {counts.output}: {counts.labelled:,} labelled"
    parts = [f"{counts.ties:,} ties"] * bool(counts.ties)
    parts += [f"{counts.unusable:,} without a usable label"] * bool(counts.unusable)
    lines = [", ".join([rows, *parts])]
    if counts.unpaired:
        lines.append(f"{counts.unpaired:,} prompts have fewer than two usable scores, so they give no pair")
    if counts.changed:
        lines.append(f"{counts.changed:,} pairs have another winner than in the data")
    if counts.skipped:
        lines.append(f"{counts.skipped:,} rows cannot be used: {counts.output}.skipped.jsonl")
    numbers: Mapping[str, Any] = counts.metrics
    if "judge/verdicts" in numbers:
        lines.append(
            f"{numbers['judge/verdicts']:,.0f} verdicts, {numbers['judge/tokens']:,.0f} tokens, "
            f"${numbers['judge/cost']:.4f} in all starts"
        )
    if "judge/orders_disagree" in numbers:
        lines.append(f"the position decides in {numbers['judge/orders_disagree']:.0%} of the pairs")
    return lines


COMMAND = Command(
    name="annotate",
    help="Label data with a judge or a reward: pairs, or prompts with completions.",
    call=annotate,
    config=AnnotateConfig,
    first="data",
    usage="Usage: palate annotate DATA --output FILE [OPTIONS]",
    order=3,
)
