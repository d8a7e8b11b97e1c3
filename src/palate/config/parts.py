"""Configuration: frozen records of numbers, names and paths, one flat class per method.

A method's class combines the parts below, so `model`, `data`, `seed` and the other shared options have the
same name and the same help in every method, in YAML, in flags and in Python. The text under a field is its
help on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from palate.config.base import (
    EMBEDDED,
    Config,
    ModelName,
    Names,
    Source,
    Trackers,
    Values,
    expand_home,
)


class ModelConfig(Config):
    """Model"""

    model: ModelName = EMBEDDED
    """Model to train: `smollm2`, which comes with Palate; a hub id; or the directory of a run, a model or an
    adapter. The model before training is also the reference."""
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
    """Device of the model: `cpu`, `cuda` or `cuda:1`; `auto` is `cuda` if available, else `cpu`."""
    max_length: int | None = Field(None, ge=2)
    """Maximum length of prompt plus completion, in tokens; default: the model's own limit."""
    chat_template: Path | None = None
    """Jinja file that replaces the model's chat template. With a template, a text prompt becomes a user
    turn. Without one, a text prompt stays as it is, and chat rows are written with the labels `User:` and
    `Assistant:`."""
    chat_template_kwargs: Values = Field(default_factory=dict)
    """Values that the chat template reads besides the turns, such as `enable_thinking=false`; a row's own
    column `chat_template_kwargs` overrides them."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: uses less memory and about a third more time."""
    fast: bool = True
    """Use Palate's own fast code for sampling and training if the model supports it; --no-fast uses
    transformers' `generate` and padded batches."""
    compile: Literal["off", "auto", "on"] = "off"
    """Compute what lies between the matrix products on a CPU with functions compiled from C++: faster, with
    other rounding in the last bits. `on` needs a C++ compiler. `auto` compiles if there is one, for sampling
    alone only from 20,000 tokens; a run that resumes repeats its first choice."""
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
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Share of the old mean that Adam's running mean of gradients keeps at each step."""
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    """Share of the old mean that Adam's running mean of squared gradients keeps at each step."""
    adam_eps: float = Field(1e-8, gt=0)
    """Number that Adam adds to the size of a gradient before it divides by it; much smaller gradients do not
    move their weights."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest gradient norm; larger gradients are scaled down to it."""
    masters: Literal["float32", "live"] = "float32"
    """Number format of the optimizer's weights, gradients and moments. `live` uses the format of the model's
    weights: this saves memory, but in bfloat16 small updates are lost."""
    sharding: Literal["auto", "none", "full"] = "auto"
    """Division of the weights and of the optimizer among several processes: `none` has a copy in each, `full`
    has a part in each, `auto` is `none` unless training needs more than an accelerator's memory."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """Most tokens, padding included, in one forward and backward pass; changes memory use, not results.
    Default: 1536 on a CPU, and 8192 elsewhere."""

    @model_validator(mode="after")
    def _warms_up(self) -> Self:
        check_warmup(self.warmup_steps, self.schedule_steps)
        return self

    @property
    def schedule_steps(self) -> int | None:
        """The optimizer steps of the learning-rate schedule; None if they depend on the data."""
        return getattr(self, "steps", None)


def tokens_per_pass(option: int | None, *, on_cpu: bool) -> int:
    """Return the most tokens of a pass: the option `micro_batch_tokens`, or its default.

    On a CPU, products of fewer tokens use its matrix units less, and more tokens need more memory.
    """
    return option or (1536 if on_cpu else 8192)


def check_warmup(warmup_steps: int, steps: int | None) -> None:
    """Refuse a warm-up that takes all of the steps, for the learning rate would never reach its peak.

    Raises:
        ValueError: the warm-up is that long. Palate checks this only if the number of steps is known.
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
    """Maximum number of tokens per completion; longer completions are truncated."""
    stop: Names = ()
    """Texts that end a completion."""
    sampling_rows: int | None = Field(None, ge=1)
    """Completions sampled in parallel; changes memory use and speed, not results (in float32). Default: 64,
    and up to 256 with 16 or more completions per prompt, if their keys and values fit in 2 GiB; 256 if a
    server samples."""

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
        """Return only the sampling options."""
        return self.part(Sampling)

    @property
    def unrestricted(self) -> Sampling:
        """Return options that sample the model's own distribution: temperature 1, without restrictions."""
        kept = {"max_new_tokens", "stop", "sampling_rows"}
        return Sampling(**{name: getattr(self, name) for name in kept})


GUARDED = ("--host", "--port", "--uds", "--api-key", "--model", "--served-model-name", "--logprobs-mode")
"""Arguments of a vLLM server that Palate chooses: they keep it on this machine, behind a key that is in no
file, with the policy's model and its own log-probabilities."""


class Rollouts(Sampling):
    """Sampling"""

    eval_temperature: float | None = Field(None, ge=0)
    """Temperature of the held-out completions, before and after training; default: `temperature`. A model is
    often used at a lower temperature than it learns at."""
    rollouts: str = "local"
    """Engine that samples the completions of the policy or the pool: `local`, Palate itself; `vllm:URL`, a
    running vLLM server; `vllm`, a vLLM server that Palate starts on this machine and ends with the run."""
    vllm_python: Path | None = None
    """With `--rollouts vllm`: Python of the environment that has vLLM. Default: the environment variable
    PALATE_VLLM_PYTHON, else the Python that runs Palate."""
    vllm_args: Names = ()
    """With `--rollouts vllm`: further arguments of the server, such as `--vllm-args=--max-num-seqs=64`."""
    rollout_timeout: float = Field(600.0, gt=0)
    """Seconds after which a request to the server is sent again."""
    rollout_retries: int = Field(5, ge=0)
    """Number of times that a failed request to the server is sent again, after waits that double."""

    @property
    def held_out_sampling(self) -> Sampling:
        """Return the options of held-out completions."""
        given = self.eval_temperature
        return self.sampling if given is None else self.sampling.model_copy(update={"temperature": given})

    @model_validator(mode="after")
    def _has_a_server_for_its_options(self) -> Self:
        own = ("vllm_python", "vllm_args")
        idle = {"vllm": (), "local": (*own, "rollout_timeout", "rollout_retries")}.get(self.rollouts, own)
        for name in idle:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect with rollouts {self.rollouts}; give --rollouts vllm")
        return self

    @field_validator("rollouts")
    @classmethod
    def _names_an_engine(cls, given: str) -> str:
        if given in ("local", "vllm"):
            return given
        kind, _, url = given.partition(":")
        parts = urlsplit(url)
        if kind != "vllm" or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(
                f"rollouts is {given!r}, expected local, vllm, or vllm:URL such as vllm:http://127.0.0.1:8000"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError(
                "the URL of rollouts contains a user, a password or a query, and it would be written to the "
                "run's files; put the server's key into the environment variable VLLM_API_KEY"
            )
        return given.rstrip("/").removesuffix("/v1")

    @field_validator("vllm_args")
    @classmethod
    def _leaves_the_server_safe(cls, given: Names) -> Names:
        for argument in given:
            name = argument.partition("=")[0].replace("_", "-")
            # vLLM also accepts the beginning of a name.
            if len(name) > 2 and any(guarded.startswith(name) for guarded in GUARDED):
                raise ValueError(
                    f"vllm_args contains {name}, which Palate sets itself so that the server is safe and "
                    "serves the policy; remove it, or start a server of your own and give its address with "
                    "--rollouts vllm:URL"
                )
        return given

    @field_validator("vllm_python", mode="before")
    @classmethod
    def _python_at_home(cls, given: Any) -> Any:
        return expand_home(given)


class KLConfig(Config):
    """Distance from the start"""

    max_kl: float | None = Field(None, gt=0)
    """Bound on KL(policy || start), in nats per completion of at most max_new_tokens tokens. Training ends
    with the last checkpoint within it. Default: no bound."""
    kl_every: int | None = Field(None, ge=1)
    """Number of steps between measurements of that KL, on fresh samples at temperature 1 without top-k or
    top-p; default: 10 with max_kl, and no measurements without it."""
    keep: Literal["last", "best"] = "last"
    """Checkpoint that is the run's result: the last one, or the one with the best mean reward among those
    measured every `kl_every` steps on `kl_prompts` training prompts, within `max_kl` if that is set."""
    kl_prompts: int = Field(32, ge=2)
    """Number of training prompts per measurement, with one completion each."""


class DataConfig(Config):
    """Data"""

    data: Source
    """Training data: a file (.jsonl, .json, .csv, .tsv, also with .gz; or .parquet), a folder of such files
    or saved by `datasets`, a hub id (`owner/name` or `owner/name:config`), or `everyday` (prompts that come
    with Palate)."""
    split: str = "train"
    """Split to train on, for data with splits."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Names of the columns in your data, as OURS=YOURS, such as `prompt=instruction`."""
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


class RunConfig(Config):
    """Run"""

    may_change: ClassVar[frozenset[str]] = frozenset(
        {"output", "overwrite", "report_to", "checkpoint_every", "keep_checkpoints", "max_dead_steps"}
        | {"judge_key_env", "judge_keys", "verdict_cache", "max_verdicts", "max_judge_tokens", "max_cost"}
        | {
            "probe_pairs",
            "probe_data",
            "price_in",
            "price_out",
            "judge_concurrency",
            "judge_requests_per_minute",
        }
        | {"judge_tokens_per_minute", "judge_timeout", "judge_retries", "judge_max_wait"}
        | {"probe_pairs", "probe_data"}
        | {"processes", "process_limit"}
        | {"rollouts", "vllm_python", "vllm_args", "rollout_timeout", "rollout_retries"}
    )
    """Fields that may change when a run is resumed and that affect none of its numbers."""
    may_change_bits: ClassVar[frozenset[str]] = frozenset(
        {"steps", "epochs", "eval_every", "threads", "device", "fast"}
        | {"micro_batch_tokens", "sampling_rows", "compile", "checkpointing", "sharding"}
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
    """Number of CPU threads, divided among the processes on a machine; default: the number of cores."""
    processes: int | None = Field(None, ge=1)
    """Number of processes that train together; `palate run` starts them on this machine. Default: one, or
    those that `torchrun` has started."""
    process_limit: float = Field(1800.0, gt=0)
    """Longest wait for another process, in seconds; a process that asks a judge may take longer."""
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
    """Number of prompts per optimizer step."""
    steps: int = Field(100, ge=1)
    """Number of optimizer steps."""
