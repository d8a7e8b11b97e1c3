"""Options of the judge and of the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from palate.config.base import (
    Config,
    Rewards,
    expand_home,
)


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

    @field_validator("reward", mode="before")
    @classmethod
    def _at_home(cls, given: Any) -> Any:
        return expand_home(given)
