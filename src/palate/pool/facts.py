"""The files of a pool, and the facts that its candidates depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from palate.annotate import identities_of
from palate.config import JudgeConfig, RewardConfig, RunConfig
from palate.errors import ConfigError, RunError
from palate.given import is_judge
from palate.run.status import write_json
from palate.rundir import read_object, read_summary
from palate.rundir.files import POOL

SHARDS, SAMPLED = "shards", "sampled"
FORMAT = 1
"""Version of the files' format."""

LOCAL = "local"
"""The engine of a pool that Palate itself samples."""

Scope = Literal["completion", "first", "group"]
"""The texts that a reward depends on: its completion; also the group's first one; all of the group."""


@dataclass(frozen=True)
class Facts:
    """The facts that the candidates of a pool depend on.

    Attributes:
        id: identity of the pool; it moves with the directory.
        model: the model's name as given.
        weights: hash of the weights that sampled.
        dtype: their number format.
        sampling: the sampling options by name.
        n: completions of each prompt.
        seed: seed of the draws.
        annotator: the options that decide the rewards; None for a pool without rewards.
        scope: the texts that a reward depends on.
        prompts: number of prompts.
        shards: number of files.
        date: the date for chat templates that print it.
        format: version of the files' format.
        engine: the engine that sampled: `local`, or vLLM with its version; several versions if it got another
            one before the pool was finished.
    """

    id: str
    model: str
    weights: str
    dtype: str
    sampling: Mapping[str, Any]
    n: int
    seed: int
    annotator: Mapping[str, Any] | None
    scope: Scope
    prompts: int
    shards: int
    date: str
    format: int = FORMAT
    engine: str = LOCAL

    @property
    def engine_kind(self) -> str:
        """Return the value of `rollouts` without an address."""
        return kind_of(self.engine)


def kind_of(engine: str) -> str:
    """Return the kind of an engine's name, or of a value of `rollouts`: `local` or `vllm`."""
    return LOCAL if engine == LOCAL else "vllm"


def write_facts(directory: Path, facts: Facts) -> None:
    """Write `pool.json` completely or not at all."""
    write_json(directory / POOL, asdict(facts))


def read_facts(directory: Path) -> Facts:
    """Return the facts of the pool in a directory.

    Raises:
        ConfigError: it holds no pool, or a pool of another version.
        RunError: its description cannot be read.
    """
    there = read_object(directory / POOL) if directory.is_dir() else None
    if there is None:
        problem = "has no pool.json" if directory.is_dir() else "is not a directory"
        raise ConfigError(
            f"{str(directory)!r} {problem}, so it holds no pool; make one with `palate pool DATA --output "
            f"{directory}`"
        )
    if there.get("format") != FORMAT:
        raise ConfigError(
            f"the pool in {str(directory)!r} has format {there.get('format')}, expected {FORMAT}; read it "
            "with the version of Palate that made it, or make it again"
        )
    names = {field.name for field in fields(Facts)}
    if missing := names - there.keys() - {"engine"}:  # a pool of an earlier version has a local engine
        raise RunError(f"{str(directory / POOL)!r} lacks {', '.join(sorted(missing))}; restore a good copy")
    return Facts(**{name: there[name] for name in names & there.keys()})


def shard_path(directory: Path, number: int, *, part: str = SHARDS) -> Path:
    """Return the file of a shard, counted from 0."""
    return directory / part / f"{number:05d}.parquet"


def missing_shards(directory: Path, facts: Facts) -> list[int]:
    """Return the numbers of the shards that are not written yet."""
    return [i for i in range(facts.shards) if not shard_path(directory, i).exists()]


def annotator_facts(cfg: RewardConfig) -> dict[str, Any] | None:
    """Return the options that decide the rewards, with keys of the rewards' code and models.

    The result is None without an annotator.
    """
    if not (cfg.reward or cfg.judge):
        return None
    values = cfg.model_dump(mode="json")
    judge = [name for name in JudgeConfig.model_fields if name not in RunConfig.may_change]
    own = {name: values[name] for name in ("label_noise", *judge)} | {"judge_mode": _mode(cfg)}
    rewards, code = [str(spec) for spec in cfg.reward], identities_of(cfg.reward)
    return {"reward": rewards, "missing_eos_penalty": cfg.annotator_penalty, **own, "code": code}


def changed_rewards(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> list[str]:
    """Return the names of the rewards whose code or model differs between two `annotator_facts`."""
    then, now = ((facts or {}).get("code", {}) for facts in (there, here))
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def _mode(cfg: RewardConfig) -> str | None:
    """Return the mode of the judge, which by default depends on what the method compares."""
    if cfg.judge is None or cfg.judge_mode is not None:
        return cfg.judge_mode
    single = getattr(cfg, "n", 2) == 1 or getattr(cfg, "compares_rewards", None) is not None
    return "score" if single and not cfg.compares_pairs else "pairwise"


def scope_of(cfg: RewardConfig) -> Scope:
    """Return the texts that a reward of the configured annotator depends on."""
    if cfg.judge is not None or cfg.label_noise:
        return "group"
    return "first" if any(map(is_judge, cfg.reward)) else "completion"


def note_for_plans(directory: Path) -> str:
    """Return a sentence on the candidates that a planned run finds in a pool.

    Raises:
        ConfigError: the directory holds no pool.
    """
    facts, made = read_facts(directory), read_summary(directory) or {}
    count = int(made.get("completions") or facts.prompts * facts.n)
    scored = "sampled" if facts.annotator is None else "sampled and scored"
    return (
        f"these amounts include the candidates of the first round, which are in the pool in {directory}: "
        f"it has {count:,} completions, {scored} already"
    )


def listed(values: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return options in words, such as `temperature 0.7, top_k 40`."""
    return ", ".join(f"{name} {_said(values[name])}" for name in names)


def _said(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return (
        "none" if value is None or value == {} else f"{value:g}" if isinstance(value, float) else str(value)
    )
