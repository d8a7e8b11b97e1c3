"""The options of `palate pool`. This module loads neither torch nor numpy."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from palate.config import (
    DataConfig,
    ModelConfig,
    ModelName,
    RewardConfig,
    Rollouts,
    RunConfig,
    Sampling,
    Source,
)
from palate.config.base import EMBEDDED

COMPLETIONS = 512
"""Completions in a shard by default: the most that a kill costs."""

FROM_METHOD = (*(name for name in Sampling.model_fields if name != "sampling_rows"), "n")
"""Options that `method` fills in."""


class PoolConfig(RewardConfig, Rollouts, ModelConfig, DataConfig, RunConfig):
    """Pool"""

    may_change: ClassVar = RunConfig.may_change | {"ray", "workers", "scorers", "ray_address"}
    unoffered: ClassVar = frozenset(
        {"lora", "lora_rank", "lora_alpha", "checkpointing", "eval_reward", "probe_pairs", "probe_data"}
        | {"data", "eval_data", "eval_split", "eval_limit", "eval_temperature", "fresh_prompts"}
        | {
            "report_to",
            "checkpoint_every",
            "keep_checkpoints",
            "max_dead_steps",
            "processes",
            "process_limit",
        }
    )
    """`data` is the first word; the others have no use without training."""

    data: Source
    """Prompts: a file (.jsonl, .json, .csv, .tsv, also with .gz; or .parquet), a folder of such files or
    saved
    by `datasets`, a hub id (`owner/name` or `owner/name:config`), or `everyday` (prompts that come with
    Palate)."""
    model: ModelName = EMBEDDED
    """Model to sample from: `smollm2`, which comes with Palate; a hub id; or the directory of a run, a model
    or an adapter."""
    method: str | None = None
    """Method that will read the pool, such as `rso`: its defaults of n and of the sampling options replace
    those shown here."""
    n: int = Field(8, ge=1)
    """Number of completions per prompt; a method may read fewer."""
    shard_size: int | None = Field(None, ge=1)
    """Prompts per file. A file is written at once, so it is the most work that a kill costs. Default: so many
    that a file has about 512 completions."""
    ray: bool = False
    """Sample and score in several processes or on several machines with Ray (`pip install palate[ray]`)."""
    workers: int = Field(2, ge=1)
    """With --ray: number of processes that sample, each with its own copy of the model. With a vLLM server
    the copy is in the machine's memory, and checks the replies."""
    scorers: int = Field(1, ge=1)
    """With --ray: number of processes that score with reward models. Functions and judges are asked by the
    process that starts the pool, which stores each answer."""
    ray_address: str | None = None
    """With --ray: address of a running Ray cluster, such as `auto`; all machines must share the output's file
    system. Default: Ray starts on this machine, and ends with the pool."""

    @model_validator(mode="before")
    @classmethod
    def _of_method(cls, given: Any) -> Any:
        """Fill in the options that the method sets and the user does not."""
        name = given.get("method") if isinstance(given, dict) else None
        return given if name is None else {**defaults_of(str(name)), **given}

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.judge == "self":
            raise ValueError("judge is self, but a pool trains no policy; name a model, as local:MODEL")
        alone = ("workers", "scorers", "ray_address")
        idle = [n for n in alone if getattr(self, n) != type(self).model_fields[n].default and not self.ray]
        if idle:
            raise ValueError(f"{idle[0]} has no effect without ray; give --ray")
        if self.ray and self.compile == "on":
            raise ValueError("compile is on, but Ray's workers sample plain; leave --compile out, or --ray")
        if self.ray and self.rollouts == "vllm":
            raise ValueError(
                "rollouts is vllm, which starts one server on this machine, but with ray the workers may be "
                "on others; start a server that all of them reach and give --rollouts vllm:URL, or leave "
                "--ray out"
            )
        return self

    @property
    def compares_rewards(self) -> str | None:
        """The part of the method that compares rewards of different prompts, or None."""
        from palate.methods import METHODS

        threshold = self.method is not None and getattr(METHODS[self.method].config, "has_threshold", False)
        return "the method compares all rewards with one threshold" if threshold else None

    @property
    def prompts_per_shard(self) -> int:
        """Return the number of prompts in a file."""
        return self.shard_size or max(2, COMPLETIONS // self.n)


def defaults_of(method: str) -> dict[str, Any]:
    """Return a method's defaults of the options in `FROM_METHOD`.

    Raises:
        ValueError: the method is unknown, or reads no pool.
    """
    from palate.methods import METHODS
    from palate.near import near

    able = [name for name, other in METHODS.items() if "pool" in other.config.model_fields]
    if method not in able:
        meant = near(method, able)
        raise ValueError(
            f"method is {method!r}, which reads no pool; expected {', '.join(able)}"
            + (f"; did you mean {meant}?" if meant else "")
        )
    fields = METHODS[method].config.model_fields
    return {name: fields[name].get_default(call_default_factory=True) for name in FROM_METHOD}
