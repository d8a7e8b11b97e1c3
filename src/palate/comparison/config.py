"""The options of `palate compare`. This module loads neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from palate.config import Config, Names, Numbers, split_commas
from palate.config.base import Rewards, expand_home

BUDGETS = ("budget_prompts", "budget_tokens", "budget_verdicts", "budget_cost", "budget_steps")
"""The units of a budget; exactly one is given."""


class CompareConfig(Config):
    """Comparison"""

    methods: Annotated[Names, BeforeValidator(split_commas)] = Field(min_length=1)
    """Methods to compare, separated by commas; `dpo:FILE.yaml` is dpo with the options of a file, and
    `NAME=dpo:FILE.yaml` gives it a name of its own."""
    seeds: int = Field(2, ge=1)
    """Number of seeds of each method."""
    data: str
    """Training prompts, the same for all methods."""
    split: str = "train"
    """Split of the training prompts."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Names of the columns in your data, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=2)
    """Use only this many prompts, from the start of the data; default: all."""
    eval_data: str | None = None
    """Test prompts; default: the split `eval_split` of `data`."""
    eval_split: str = "test"
    """Split of the test prompts."""
    eval_limit: int | None = Field(100, ge=2)
    """Use only this many test prompts, from the start of the data."""
    output: Path
    """Directory of the comparison. The same command again resumes it."""
    reward: Rewards = ()
    """The annotator that all methods learn from and are measured by: rewards as in `palate run`."""
    gold: Rewards = ()
    """A hidden annotator that no method sees, for the measurement only."""
    budget_prompts: int | None = Field(None, ge=2)
    """Budget of each method in prompts: how often it may sample for a prompt."""
    budget_tokens: int | None = Field(None, ge=1)
    """Budget of each method in sampled tokens, the tokens of its data included."""
    budget_verdicts: int | None = Field(None, ge=1)
    """Budget of each method in questions to the annotator."""
    budget_cost: float | None = Field(None, gt=0)
    """Budget of each method in dollars for the annotator."""
    budget_steps: int | None = Field(None, ge=1)
    """Budget of each method in optimizer steps."""
    model: str = "smollm2"
    """Model that all methods start from: a hub id, a directory, or `smollm2`."""
    sft: str | None = None
    """Demonstrations for supervised fine-tuning of the model, once, before all methods start from it."""
    learnt_reward: bool = False
    """Train a reward model once, on pairs labelled by the annotator, for the methods whose recipe has one."""
    batch_size: int = Field(16, ge=1)
    """Records per optimizer step; a method that samples in each step takes its prompts from the budget."""
    max_new_tokens: int = Field(64, ge=1)
    """Most tokens of a completion, in training and in measurements."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of all sampling, in training and in measurements."""
    lr: float | None = Field(None, gt=0)
    """Learning rate of every method; default: each method's own."""
    tune: Literal["lr"] | None = None
    """Search the learning rate of every method, with the same trials, on a validation split of the training
    prompts."""
    tune_factors: Numbers = (0.3, 1.0, 3.0)
    """Learning rates to try, as multiples of the method's own."""
    points: int = Field(3, ge=1)
    """Checkpoints of each run that are measured for the frontier, the last one included."""
    jobs: int = Field(1, ge=1)
    """Number of runs at the same time; they share the processor's cores."""
    seed: int = Field(0, ge=0)
    """Seed of the pool and of the measurements, and the first seed of the methods."""
    device: str = "auto"
    """Device of all runs."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the model's weights."""

    unoffered: ClassVar = frozenset({"passed"})
    passed: Mapping[str, Any] = Field(default_factory=dict)
    """Options of `palate run` by field name, for every method that has them."""

    may_change: ClassVar[frozenset[str]] = frozenset({"output", "jobs", "methods", "seeds"})
    """Fields that may change when a comparison is resumed: methods and seeds can be added."""

    @field_validator("output", mode="before")
    @classmethod
    def _output_at_home(cls, given: Any) -> Any:
        return expand_home(given)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        flags = " or ".join("--" + name.replace("_", "-") for name in given or BUDGETS)
        if len(given) != 1:
            raise ValueError(
                f"{len(given) or 'no'} budgets are given; give one of {flags}: all methods spend the same"
            )
        if not self.reward and not (self.passed.get("judge") or getattr(self, "judge", None)):
            raise ValueError(
                "no reward is given; name at least one, such as --reward sentiment, or a judge, such as "
                "--judge local:MODEL"
            )
        return self

    @property
    def budget(self) -> tuple[str, float]:
        """The unit of the budget (`tokens`) and its amount."""
        name = next(name for name in BUDGETS if getattr(self, name) is not None)
        return name.removeprefix("budget_"), getattr(self, name)


SET_FOR_ALL = frozenset(
    {
        "model",
        "data",
        "split",
        "map",
        "limit",
        "eval_data",
        "eval_split",
        "eval_limit",
        "eval_reward",
        "output",
    }
    | {"seed", "steps", "epochs", "prompts_per_round", "batch_size", "max_new_tokens", "temperature", "top_k"}
    | {"top_p", "device", "dtype", "checkpoint_every", "keep_checkpoints", "fresh_prompts", "threads"}
    | {"overwrite", "report_to", "eval_every"}
)
"""Fields that are the same for all methods, so that the file of a method cannot set them."""

SET_BY_BUDGET = frozenset(
    {"steps", "epochs", "n", "rounds", "prompts_per_round", "overwrite", "checkpoint_every", "variant"}
    | {"keep_checkpoints", "pairs", "fresh_prompts", "threads", "eval_reward", "report_to", "eval_every"}
)
"""Fields of methods that a comparison sets itself, so that no flag passes them on."""
