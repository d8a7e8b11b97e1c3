"""`palate pool DATA`: sample and score candidates of many prompts, for several methods to read."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from palate.cli.command import Command
from palate.pooling.config import PoolConfig

if TYPE_CHECKING:
    from palate.pooling import Made


class PrintedPoolConfig(PoolConfig):
    """Pool"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}
    """Flags that are not named like their field."""
    json_only: bool = False
    """Print the counts as one JSON object and nothing else on stdout."""


def pool(config: PrintedPoolConfig) -> int:
    """Make the pool, then print its counts."""
    from rich.console import Console
    from rich.text import Text

    from palate.pooling import make_pool
    from palate.quiet import quiet_libraries
    from palate.run import Display, plain

    quiet_libraries()
    made = make_pool(config.part(PoolConfig), display=Display(quiet=config.json_only, titled=True))
    if config.json_only:
        print(jsonlib.dumps(made.summary))
        return 0
    console = Console()
    for line in _lines(made):
        console.print(Text(plain(line)), soft_wrap=True, highlight=False)
    return 0


def _lines(made: Made) -> Iterator[str]:
    """Yield the counts in words."""
    n: Mapping[str, Any] = made.summary
    prompts, place = n["prompts"] - n["failed_prompts"], made.directory / "shards"
    yield f"{n['completions']:,} completions of {prompts:,} prompts in {place}"
    bad = {
        "failed_prompts": "prompts without completions",
        "empty": "empty completions",
        "without_reward": "completions without a reward",
    }
    counted = [f"{n[name]:,} {words}" for name, words in bad.items() if n[name]]
    if counted:
        yield f"{', '.join(counted)}; the column `error` says why"
    if n["truncated"]:
        yield f"{n['truncated']:,} completions are truncated at max_new_tokens"
    if "mean_reward" in n:
        yield f"mean reward {n['mean_reward']:.3f}"
    if "judge_verdicts" in n:
        costs = f"{n['judge_tokens']:,.0f} tokens, ${n['judge_cost']:.4f}"
        yield f"{n['judge_verdicts']:,.0f} verdicts, {costs} in all starts"
    yield f"\ntry next\n    palate run METHOD --pool {made.directory} --data DATA"


COMMAND = Command(
    name="pool",
    help="Sample and score candidates of many prompts, for several methods to read.",
    call=pool,
    config=PrintedPoolConfig,
    first="data",
    usage="Usage: palate pool DATA --output DIR [OPTIONS]",
    order=2,
)
