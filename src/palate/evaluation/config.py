"""The options of `palate evaluate models`. This module loads neither torch nor numpy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from palate.config import ModelConfig, Names, RewardConfig, RunConfig, Sampling, Source

FROM_DATA = "data"
"""The value of `against` that means the completions in the data."""


Scale = Literal["score", "probability", "log-odds"]
"""The meaning of two rewards: scores, the probabilities of winning, or the log-odds of winning by their
difference."""


class EvaluateConfig(RewardConfig, Sampling, RunConfig):
    """Evaluation"""

    unoffered: ClassVar = frozenset(
        {"eval_reward", "report_to", "checkpoint_every", "keep_checkpoints", "max_dead_steps"}
        | {"probe_pairs", "probe_data"}
        | {"probe_pairs", "probe_data", "label_noise"}
    )
    """Fields of the parts that only matter for training."""

    model: Names = Field(min_length=1)
    """Model to measure: a hub id, a directory, a run, or `smollm2`. With several, also the best of all on
    each prompt."""
    against: str | None = None
    """Baseline: another model, or `data` for the completions in the data. Required for one model."""
    data: Source = "everyday"
    """Held-out prompts: a .jsonl or .parquet file, a saved `datasets` directory, a hub id, or `everyday`."""
    split: str = "test"
    """Split of the data."""
    map: Mapping[str, str] = Field(default_factory=dict)
    """Names of the columns in your data, such as `prompt=instruction`."""
    limit: int | None = Field(None, ge=1)
    """Use only this many rows, from the start of the data; default: all."""
    max_bad_rows: float = Field(0.01, ge=0, le=1)
    """Largest share of rows that may be skipped because they cannot be used; one row is always allowed."""
    strict: bool = False
    """Refuse the data at the first row that cannot be used."""
    n: int = Field(1, ge=1)
    """Completions of each prompt; the i-th of a model is compared with the i-th of the baseline."""
    text: Source | None = None
    """Your own text, on which the perplexity of each model is measured: a .txt file, or data with prompts and
    completions."""
    kl: bool = True
    """Measure KL(model || baseline) at temperature 1, if the baseline is a model with the same vocabulary."""
    dtype: Literal["auto", "float32", "bfloat16"] = ModelConfig.model_fields["dtype"].default
    """Number format of the models' weights."""
    device: str = "auto"
    """Device to sample on: `cpu`, `cuda` or `cuda:1`; `auto` is `cuda` if available, else `cpu`."""
    fast: bool = True
    """Use Palate's own fast code for sampling if the model supports it."""
    compile: Literal["off", "auto", "on"] = "off"
    """Compute what lies between the matrix products on a CPU with functions compiled from C++: faster, with
    other rounding in the last bits. `on` needs a C++ compiler. `auto` compiles if there is one and the models
    may sample 20,000 tokens or more; a run that resumes repeats its first choice."""
    trust_remote_code: bool = False
    """Run Python code that comes with a model. Such code can do anything on this machine."""

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if not (self.reward or self.judge):
            raise ValueError(
                "no reward is given; name at least one, such as --reward sentiment, or a judge, such as "
                "--judge local:MODEL"
            )
        if self.judge == "self":
            raise ValueError(
                "judge is self, but an evaluation trains no policy; name a model, as local:MODEL"
            )
        if len(self.model) == 1 and self.against is None:
            raise ValueError(
                "one model is given and nothing to compare it with; give --against MODEL, --against data, or "
                "another --model"
            )
        twice = [name for name in (*self.model, self.against) if (*self.model, self.against).count(name) > 1]
        if twice:
            raise ValueError(f"the model {twice[0]} is given twice; give each model once")
        return self

    @property
    def place(self) -> Path:
        """The directory of the results: `output`, or one in `runs` that belongs to these settings."""
        if self.output is not None:
            return self.output
        kept = self.model_dump(mode="json", exclude={*self.may_change, "compile"})
        digest = hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=4).hexdigest()
        return Path("runs") / f"evaluate-{digest}"

    @property
    def pairwise(self) -> bool:
        """True if the rewards come from comparisons with the other completions of the prompt."""
        return self.scale != "score"

    @property
    def scale(self) -> Scale:
        """The scale of the rewards: log-odds of a ranker, probabilities of another judge that compares."""
        from palate.given import GivenReward, is_judge

        if self.judge is not None:
            return "probability" if self.judge_mode in (None, "pairwise") else "score"
        judge = next((spec for spec in self.reward if is_judge(spec)), None)
        if judge is None:
            return "score"
        if isinstance(judge, GivenReward):
            from palate.annotate import Ranker

            return "log-odds" if isinstance(judge.reward, Ranker) else "probability"
        return "log-odds"

    @property
    def annotating(self) -> EvaluateConfig:
        """The options for the annotator, which always gets several completions of a prompt: one per side."""
        return self.model_copy(update={"n": max(2, self.n)})

    def loading(self, model: str) -> ModelConfig:
        """Return the options to load a model."""
        names = "dtype", "device", "fast", "compile", "trust_remote_code"
        return ModelConfig(model=model, **{name: getattr(self, name) for name in names})
