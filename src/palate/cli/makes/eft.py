"""`palate make eft`: make examples that teach a model to grade answers, from answers that people ranked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.cli.command import Command
from palate.config import DataConfig, JudgeConfig, ModelConfig, RunConfig, Source
from palate.errors import ConfigError, DataError

if TYPE_CHECKING:
    from palate.data.ranked import Ranking
    from palate.making.eft import Asking, Made

GOLD = "gold"
"""The writer that composes gradings from the ranks."""

QUESTION = ("judge_mode", "criteria", "judge_template", "judge_reasoning", "judge_max_text")
"""Fields of a judge that its question depends on, and so those that matter for `gold`."""


class EFTConfig(JudgeConfig):
    """Examples"""

    unoffered: ClassVar = frozenset(
        {
            *("judge", "judge_samples", "judge_logprobs", "judge_label_mass", "verdict_cache"),
            *("judge_panel", "judge_expert", "judge_unsure", "judge_keys", "probe_pairs", "probe_data"),
        }
    )
    """Fields of a judge that do not matter for the written gradings of one model."""
    judge_mode: Literal["rubric", "score"] = "rubric"
    """`rubric` adds up to 5 points with a justification, `score` gives a number from 1 to 10 alone."""
    data: Source
    """Answers with ranks or scores: a row per prompt with `completions` and `scores` (or `ranks`), a row per
    answer with `completion` and `score` (or `rank`), or pairs with `chosen` and `rejected`."""
    split: str = DataConfig.model_fields["split"].default
    """Split of the data."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Columns of the data by field, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Number of rows to use, from the start of the data. Default: all."""
    eft_writer: str = GOLD
    """Writer of the gradings. `local:MODEL` or `server:MODEL@URL` writes them, and those whose scores order
    the answers of a prompt as people do are kept. `gold` composes them from the ranks by template, for models
    that are too small to write their own."""
    justifications: Path | None = None
    """Text file with the justifications that `gold` writes in mode `rubric`: a line for each number of
    points, from 0 to 5. A small model learns faster if they begin with words that it would choose itself,
    such as `Sad.` and `Happy.`. Default: `None of the statements holds.` and so on."""
    attempts: int = Field(3, ge=1)
    """Most gradings of an answer by a model, until those of a prompt agree with the ranks."""
    per_score: int | None = Field(None, ge=1)
    """Most examples of each score. Default: twice the median number of examples per score (of two medians,
    the lower)."""
    held_out: float = Field(0.2, ge=0, lt=1)
    """Share of the prompts that is held out to measure the judge, in FILE-held-out.jsonl."""
    chat: bool = True
    """The model that learns has a chat template; with --no-chat, questions end in `Answer:`, as a judge asks
    a model without a template."""
    output: Path = Path("eft.jsonl")
    """File to write. The gradings of a model are kept beside it in FILE.journal.db, so that an interrupted
    command resumes."""
    device: str = ModelConfig.model_fields["device"].default
    """Device of a local writer."""
    seed: int = RunConfig.model_fields["seed"].default
    """Random seed of the held-out part and of the order."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.justifications is not None and (self.eft_writer != GOLD or self.judge_mode != "rubric"):
            raise ValueError(
                "justifications are for --eft-writer gold and --judge-mode rubric, but these are "
                f"{self.eft_writer!r} and {self.judge_mode!r}; leave --justifications out"
            )
        if self.judge_mode == "score" and self.judge_reasoning:
            raise ValueError(
                f"judge_reasoning is {self.judge_reasoning}, but the examples of --judge-mode score are bare "
                "numbers, without reasoning; leave --judge-reasoning out, here and in the run, or use "
                "--judge-mode rubric"
            )
        fields = type(self).model_fields
        idle = [
            name
            for name in ("attempts", *JudgeConfig.model_fields)
            if name not in QUESTION
            and getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if self.eft_writer == GOLD and idle:
            raise ValueError(
                f"{idle[0]} is set, but eft_writer is gold, which asks no model; leave it out, or name a "
                "model as --eft-writer"
            )
        return self


def make(config: EFTConfig) -> int:
    """Write the examples and the held-out part, then print the counts."""
    from palate.data import Account, check_target
    from palate.data.ranked import read_rankings

    output = config.output.expanduser()
    for target in (output, _held_out(output)):
        check_target(target, config.data, config.justifications, config.judge_template)
    account = Account(strict=True)
    options: dict[str, Any] = {"split": config.split, "columns": config.map, "limit": config.limit}
    rankings = read_rankings(config.data, **options, account=account)
    for line in account.lines():
        print(line)

    from palate.making.eft import balanced, divided

    learnt, unseen = divided(rankings, config.held_out, config.seed)
    if not learnt:
        raise DataError(
            f"{config.data}: all of its {len(unseen)} prompts with ranked answers are held out; give more "
            "prompts, or --held-out 0"
        )
    made = balanced(_made(config, learnt, output), most=config.per_score, rng=Random(config.seed))
    if not made.gradings:
        reasons = ", ".join(f"{number}: {reason}" for reason, number in made.left_out.most_common())
        raise DataError(
            f"no example is left of {len(learnt)} prompts ({reasons or 'none was graded'}); use a better "
            "--eft-writer, more --attempts, or --eft-writer gold"
        )
    _write(output, made, unseen)
    _report(output, made, len(learnt))
    if unseen:
        print(f"{_held_out(output)}: {len(unseen)} held-out prompts with ranked answers")
    elif config.held_out:
        print(
            f"no prompt is held out: {config.held_out:g} of {len(learnt)} prompts, drawn by chance, came to "
            "none; give more prompts, a larger --held-out or another --seed"
        )
    return 0


def _held_out(output: Path) -> Path:
    """Return the file of the held-out part."""
    return output.with_name(f"{output.stem}-held-out{output.suffix}")


def _made(config: EFTConfig, rankings: Sequence[Ranking], output: Path) -> Made:
    """Return the gradings of the answers."""
    from palate.annotate.judges.build import RUBRIC_TOKENS
    from palate.annotate.judges.template import Template
    from palate.making.eft import HOLDING, Asking, from_gold, read_justifications

    mode = config.judge_mode
    asking = Asking(
        Template.load(mode, config.judge_template),
        config.criteria or "",
        config.judge_max_text,
        config.chat,
        config.judge_reasoning or (RUBRIC_TOKENS if mode == "rubric" else 0),
    )
    if config.eft_writer != GOLD:
        return _written(config, rankings, asking, output)
    own = config.justifications
    return from_gold(rankings, asking, HOLDING if own is None else read_justifications(own))


def _written(config: EFTConfig, rankings: Sequence[Ranking], asking: Asking, output: Path) -> Made:
    """Return the gradings of a model that agree with the ranks."""
    from palate.annotate.judges.build import MODELS, JudgeContext, judging
    from palate.annotate.judges.ledger import Ledger
    from palate.making.eft import agreeing, orderable
    from palate.quiet import quiet_libraries

    kind, _, model = config.eft_writer.partition(":")
    if not model or kind == "self" or kind not in MODELS:
        raise ConfigError(
            f"eft_writer is {config.eft_writer!r}; expected gold, local:MODEL or server:MODEL@URL"
        )
    possible = orderable(rankings, len(asking.labels))
    if left_out := len(rankings) - len(possible):
        print(
            f"left out {left_out} of {len(rankings)} prompts: they have more different ranks than the judge "
            f"has scores ({len(asking.labels)}), so that no grading can agree with them"
        )
    if not possible:
        raise DataError(
            f"{config.data}: no prompt has at most {len(asking.labels)} different ranks, the number of the "
            "judge's scores; give fewer answers per prompt, ranks with ties, or --eft-writer gold"
        )
    quiet_libraries()
    fields = {name: getattr(config, name) for name in JudgeConfig.model_fields}
    own: dict[str, Any] = {**fields, "judge": config.eft_writer, "judge_mode": asking.template.mode}
    context = JudgeContext(JudgeConfig.model_validate(own), {"device": config.device})
    with closing(Ledger(output.with_name(f"{output.name}.journal.db"))) as ledger:
        court = judging(context, ledger=ledger, say=print)
        return agreeing(possible, asking, court.judge.bench, attempts=config.attempts)


def _write(output: Path, made: Made, unseen: Sequence[Ranking]) -> None:
    """Write both files. An earlier held-out part goes first: its prompts may be among the new examples."""
    from palate.data import write_rows

    other = _held_out(output)
    if other.exists():
        try:
            other.unlink()
        except OSError as error:
            raise DataError(f"{other} cannot be replaced: {error.strerror or error}.") from error
        if not unseen:
            print(f"removed {other}, the held-out part of an earlier command")
    write_rows(output, (grading.row() for grading in made.gradings))
    if unseen:
        write_rows(other, _rows(unseen))


def _report(output: Path, made: Made, prompts: int) -> None:
    from collections import Counter

    counts = Counter(grading.score for grading in made.gradings)
    scores = ", ".join(f"{counts[score]} of score {score}" for score in sorted(counts))
    print(f"{output}: {len(made.gradings)} examples from {prompts} prompts ({scores})")
    for reason, number in made.left_out.most_common():
        print(f"left out {number}: {reason}")


def _rows(rankings: Sequence[Ranking]) -> Iterator[dict[str, Any]]:
    """Yield the rows of the held-out part, a prompt each."""
    for ranking in rankings:
        content = ranking.prompt.content
        prompt = content if isinstance(content, str) else [dict(turn) for turn in content]
        numbers = (
            {"scores": list(ranking.gold)} if ranking.comparable else {"ranks": [-g for g in ranking.gold]}
        )
        yield {"prompt": prompt, "completions": list(ranking.answers), **numbers}


COMMAND = Command(
    name="eft",
    help="Make examples that teach a model to grade, from ranked answers.",
    call=make,
    config=EFTConfig,
    order=2,
)
