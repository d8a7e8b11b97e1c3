"""`palate sample`: sample completions from a model."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from palate.cli.command import Command
from palate.config import EMBEDDED, DataConfig, ModelConfig, ModelName, RewardConfig, RunConfig, Sampling
from palate.errors import ConfigError
from palate.types import Group, Prompt


class SampleConfig(ModelConfig, Sampling, RewardConfig):
    """Sample"""

    unoffered: ClassVar = frozenset(
        {"lora", "lora_rank", "lora_alpha", "checkpointing", "eval_reward", "probe_pairs", "probe_data"}
    )
    """Fields of the parts that only matter for training."""
    flags: ClassVar[Mapping[str, str]] = {"json_lines": "--json"}
    """Switches that are not named like their field; its own name works too, and is not in the help."""
    model: ModelName = EMBEDDED
    """Model to sample from: `smollm2`, which comes with Palate; a hub id; or the directory of a run, a model
    or an adapter."""
    prompt: tuple[str, ...] = ()
    """Text to complete or answer."""
    data: str | None = None
    """Data to take the prompts from, instead of --prompt: a file (.jsonl, .json, .csv, .tsv, also with .gz;
    or .parquet), a folder of such files or saved by `datasets`, a hub id (`owner/name` or
    `owner/name:config`), or `everyday` (prompts that come with Palate)."""
    split: str = DataConfig.model_fields["split"].default
    """Split to read, for data with splits."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Names of the columns in your data, as OURS=YOURS, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, from the start of the data; default: all."""
    n: int = Field(1, ge=1)
    """Number of completions per prompt."""
    best_of: int | None = Field(None, ge=2)
    """Sample this many completions of each prompt and keep the best by the reward or the judge."""
    seed: int = RunConfig.model_fields["seed"].default
    """Random seed for sampling."""
    output: Path | None = None
    """Write the completions to this .jsonl or .parquet file instead of printing them."""
    json_lines: bool = False
    """Print one JSON object per completion and nothing else."""

    @model_validator(mode="after")
    def _chooses(self) -> Self:
        by = self.reward or self.judge
        if self.best_of is not None and not by:
            raise ValueError(
                "best_of is set and nothing chooses the best; give a reward, such as --reward sentiment, or "
                "a judge, such as --judge local:MODEL"
            )
        if self.best_of is None and by:
            raise ValueError("a reward or a judge has no effect without best_of; give --best-of N")
        if self.best_of is not None and self.n > 1:
            raise ValueError("n and best_of are both given; best_of keeps one completion of each prompt")
        return self


def sample(config: SampleConfig) -> int:
    """Sample completions, then print or write them."""
    prompts = _prompts(config)  # a mistake in the data is reported before torch is loaded

    from rich.console import Console
    from rich.text import Text

    from palate.data import check_target, write_rows
    from palate.model import Snapshot, load_model
    from palate.model.compiling import settled
    from palate.model.device import resolve
    from palate.quiet import quiet_libraries
    from palate.run import plain

    quiet_libraries()
    output = None if config.output is None else config.output.expanduser()
    if output is not None:
        check_target(output)
    options = config.part(ModelConfig)
    most = len(prompts) * (config.best_of or config.n) * config.max_new_tokens
    compiles = settled(config.compile, resolve(options)[0], most)
    model = load_model(options.model_copy(update={"compile": compiles}), trainable=False)
    snapshot = Snapshot(0, lambda: nullcontext(model), micro_batch_tokens=2048)
    groups = snapshot.sample(prompts, config.best_of or config.n, config.sampling, seed=config.seed)
    if config.best_of is not None:
        from palate.cli.best import keep_best

        notes = Console(stderr=True)
        own = {name: getattr(config, name) for name in ("device", "trust_remote_code", "fast")}
        groups = keep_best(
            groups,
            config.part(RewardConfig),
            own,
            lambda text: notes.print(Text(plain(text)), soft_wrap=True),
        )
    if output is not None:
        write_rows(output, _rows(groups))
        return 0
    if config.json_lines:
        for row in _rows(groups):
            print(jsonlib.dumps(row, ensure_ascii=False))
        return 0
    console = Console()
    for group in groups:
        for completion in group.completions:
            texts = (plain(group.prompt.text), "italic"), "\n", plain(completion.text), "\n"
            console.print(Text.assemble(*texts), soft_wrap=True)
    return 0


def _prompts(config: SampleConfig) -> list[Prompt]:
    if config.data is not None and config.prompt:
        raise ConfigError("--prompt and --data are both given; expected one of them")
    if config.data is not None:
        from palate.data import read_prompts

        return read_prompts(config.data, split=config.split, columns=config.map, limit=config.limit)
    if not config.prompt:
        raise ConfigError("no prompts are given; give --prompt TEXT or --data FILE")
    return [Prompt(text) for text in config.prompt]


def _rows(groups: list[Group]) -> Iterator[dict[str, Any]]:
    """Yield one row per completion, with TRL's column names."""
    for group in groups:
        content = group.prompt.content
        for i, completion in enumerate(group.completions):
            answer = completion.text
            if isinstance(content, str):
                texts: dict[str, Any] = {"prompt": content, "completion": answer}
            else:
                turn = {"role": "assistant", "content": answer}
                texts = {"prompt": [dict(turn) for turn in content], "completion": [turn]}
            tools = group.prompt.variables.get("tools")
            yield {
                **texts,
                **({"tools": tools} if tools else {}),
                "finish": completion.finish,
                "tokens": len(completion.token_ids),
                "logp": sum(completion.logps or ()),
                **({} if group.rewards is None else {"reward": group.rewards[i]}),
            }


COMMAND = Command(
    name="sample", help="Sample completions from a model.", call=sample, config=SampleConfig, order=2
)
