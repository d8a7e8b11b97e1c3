"""`palate inspect DATA`: show what a method would learn from data, before it learns it."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from palate.cli.command import Command
from palate.config import EMBEDDED, DataConfig, ModelConfig, ModelName
from palate.errors import ConfigError

if TYPE_CHECKING:
    from palate.method import Data, Method


class InspectConfig(ModelConfig, DataConfig):
    """Inspect"""

    unoffered: ClassVar = frozenset(
        {"lora", "lora_rank", "lora_alpha", "dtype", "device", "checkpointing", "fast"}
        | {"data", "eval_data", "eval_split", "eval_limit", "fresh_prompts"}
    )
    """`data` is the first word; the others change nothing about the tokens of a row."""
    flags: ClassVar[Mapping[str, str]] = {"json_lines": "--json"}
    """Switches that are not named like their field; its own name works too, and is not in the help."""
    model: ModelName = EMBEDDED
    """Model whose tokenizer and template turn rows into tokens: `smollm2`, which comes with Palate; a hub id;
    or the directory of a run, a model or an adapter."""
    split: str = DataConfig.model_fields["split"].default
    """Split to read, for data with splits."""
    method: str | None = None
    """Read the rows as this method does: `sft` takes the last answer of each row, `dpo` pairs, `oaif`
    prompts. Default: `dpo` for rows with chosen and rejected, `sft` for other answers, `oaif` for prompts."""
    variant: str | None = None
    """Variant of the method, such as `direct`, if it has several that read different rows."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Tokens that a prompt must leave for a completion, for methods that sample; prompts that leave less are
    skipped, as in a run. Default: 1, and the figures say how many leave less than the method's default."""
    rows: int = Field(5, ge=0)
    """Number of rows to show, from the start of the data. The figures cover all rows."""
    json_lines: bool = False
    """Print one JSON object per shown row and nothing else."""


def inspect(config: InspectConfig) -> int:
    """Read the data, turn every row into tokens and print the result."""
    method, kind, room = _how(config)

    from palate.inspection import look, read

    rows = read(config, kind)  # a mistake in the data is reported before torch is loaded

    from palate.model import load_codec
    from palate.quiet import quiet_libraries

    quiet_libraries()
    scalar = method is not None and method.learner is not None
    codec = load_codec(config.part(ModelConfig), head="scalar" if scalar else "lm")
    inspection = look(codec, rows, config.data, need=config.max_new_tokens or 1)
    if config.json_lines:
        for line in inspection.lines(config.rows):
            print(jsonlib.dumps(line, ensure_ascii=False))
        return 0

    from rich.console import Console

    from palate.cli.inspected import show_inspection

    show_inspection(inspection, codec, config.data, config.rows, Console(), room=room)
    return 0


def _how(config: InspectConfig) -> tuple[Method | None, Data | None, int]:
    """Return the method, the kind of rows that it reads, and the most tokens that it samples by default."""
    from palate.arguments import method_named
    from palate.methods import METHODS

    if config.method is None:
        if config.variant is not None:
            raise ConfigError(f"variant is {config.variant!r} without a method; give --method too")
        return None, None, 1
    method = method_named(config.method, METHODS)
    variants = [name for way in method.ways for name in way.variants]
    if config.variant is not None and config.variant not in variants:
        known = f"expected one of {', '.join(variants)}" if variants else f"{method.name} has no variants"
        raise ConfigError(f"variant is {config.variant!r}, {known}")
    way = method.variant(config.variant)
    own: Any = way.config.model_fields.get("max_new_tokens")
    return method, way.learns_from, own.default if own is not None else 1


COMMAND = Command(
    name="inspect",
    help="Show what a method would learn from data, before it learns it.",
    call=inspect,
    config=InspectConfig,
    first="data",
    usage="Usage: palate inspect DATA [OPTIONS]",
    order=1,
)
