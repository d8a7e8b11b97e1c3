"""`palate make prompts`: let a model write new prompts after examples, and filter them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from palate.cli.command import Command
from palate.config import DataConfig, ModelConfig, Names, RunConfig, Sampling, Source
from palate.errors import DataError, RunError

if TYPE_CHECKING:
    from palate.types import Prompt


class PromptsConfig(ModelConfig, Sampling):
    """Prompts"""

    unoffered: ClassVar = frozenset(
        {"lora", "lora_rank", "lora_alpha", "checkpointing", "min_new_tokens", "stop", "compile"}
    )
    """Fields of the parts that only matter for training or for single texts."""
    data: Source
    """Seed prompts that show what to write: a file, a saved data set, a hub id, or `everyday`."""
    split: str = DataConfig.model_fields["split"].default
    """Split of the data."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Columns of the data by field, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Number of seed prompts to use, from the start of the data. Default: all."""
    exclude: Names = ()
    """Further data whose prompts the new ones must not resemble, such as held-out prompts. `map` applies, and
    where its columns are missing, the usual names. Gradings stand for the prompts that they are about."""
    count: int = Field(100, ge=1)
    """Number of prompts to write."""
    output: Path = Path("prompts.jsonl")
    """File to write, .jsonl or .parquet. The replies are kept beside it in FILE.journal.db, so that an
    interrupted command resumes, and a larger --count continues."""
    min_words: int = Field(4, ge=1)
    """Shortest prompt to keep, in words."""
    max_words: int = Field(150, ge=1)
    """Longest prompt to keep, in words."""
    similarity: float = Field(0.7, ge=0, le=1)
    """Highest ROUGE-L F1 of a new prompt with any seed or kept prompt."""
    keywords: Names | None = None
    """Words that exclude a prompt; give none with an empty text. Default: those of Self-Instruct, such as
    image, graph and file."""
    shots: int = Field(6, ge=1)
    """Number of seed prompts in each request to the model."""
    own_shots: int = Field(2, ge=0)
    """Number of prompts in each request that the model has written before."""
    temperature: float = Field(0.6, ge=0)
    """1 samples the model's own distribution; lower is more deterministic."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""
    seed: int = RunConfig.model_fields["seed"].default
    """Random seed."""

    @model_validator(mode="after")
    def _some_length_fits(self) -> Self:
        if self.min_words > self.max_words:
            raise ValueError(
                f"min_words is {self.min_words} and max_words is {self.max_words}, so no prompt would be "
                "kept; lower min_words or raise max_words"
            )
        return self


def make(config: PromptsConfig) -> int:
    """Write the prompts, then print the counts."""
    from palate.data import check_target, read_prompts, write_rows

    output = config.output.expanduser()
    check_target(output, config.data, *config.exclude, config.chat_template)
    given = read_prompts(config.data, split=config.split, columns=config.map, limit=config.limit)
    seeds = list(dict.fromkeys(prompt.text for prompt in given))
    others = [prompt for source in config.exclude for prompt in _excluded(source, config)]

    from palate.annotate.judges.local import weights_digest
    from palate.journal import Journal
    from palate.making.filters import KEYWORDS, PromptFilter, subjects
    from palate.making.prompts import write_prompts
    from palate.model import Snapshot, load_model
    from palate.quiet import quiet_libraries

    quiet_libraries()
    model = load_model(config.part(ModelConfig), trainable=False)
    sieve = PromptFilter(
        [*seeds, *(text for prompt in others for text in subjects(prompt))],
        fewest=config.min_words,
        most=config.max_words,
        similarity=config.similarity,
        keywords=KEYWORDS if config.keywords is None else [word for word in config.keywords if word],
    )
    kept: list[str] = []
    with closing(Journal(output.with_name(f"{output.name}.journal.db"))) as journal:
        writer = Snapshot(
            0,
            lambda: nullcontext(model),
            micro_batch_tokens=2048,
            memory=lambda: journal,
            name=f"{config.model} {weights_digest(model)}",
        )
        options = {"seed": config.seed, "shots": config.shots, "own_shots": config.own_shots}
        try:
            written = write_prompts(writer, seeds, config.count, sieve, config.sampling, **options, kept=kept)
        except RunError as error:
            if not kept:
                raise
            write_rows(output, ({"prompt": text} for text in kept))
            raise RunError(f"{error}; {output} has the prompts kept so far ({len(kept)})") from None
    write_rows(output, ({"prompt": prompt.content} for prompt in written.prompts))
    reasons: dict[str, Any] = {str(reason): number for reason, number in sieve.left_out.most_common()}
    parts = ", ".join(f"{number} {reason}" for reason, number in reasons.items()) or "none"
    print(f"{output}: {len(written.prompts)} new prompts from {written.replies} replies; left out: {parts}")
    return 0


def _excluded(source: str, config: PromptsConfig) -> list[Prompt]:
    """Return the prompts of further data, which may have the columns of the seeds or the usual ones."""
    from palate.data import read_prompts

    try:
        return read_prompts(source, split=config.split, columns=config.map)
    except DataError:
        if not config.map:
            raise
        return read_prompts(source, split=config.split)


COMMAND = Command(
    name="prompts",
    help="Let a model write new prompts after examples.",
    call=make,
    config=PromptsConfig,
    order=1,
)
