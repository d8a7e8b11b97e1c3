"""Options of the judge and of the rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from palate.config.base import (
    Config,
    Names,
    Rewards,
    Source,
    expand_home,
)


class JudgeConfig(Config):
    """Judge"""

    judge: str | None = None
    """Language model that judges completions: `local:MODEL` (a hub id, a directory, or a run's directory),
    `server:MODEL@URL` (any OpenAI-compatible server), or `self` (the current policy)."""
    judge_mode: Literal["pairwise", "score", "rubric"] | None = None
    """`pairwise` compares two completions in both orders, `score` gives a number from 1 to 10, `rubric` adds
    up to 5 points. Default: `pairwise`, and `score` for one completion per prompt."""
    criteria: str | None = None
    """Criteria for a good completion, in plain words, such as "Prefer the shorter answer"."""
    judge_template: Path | None = None
    """Jinja file that replaces the judge's question."""
    judge_reasoning: int = Field(0, ge=0)
    """Maximum number of tokens of reasoning that the judge writes before its verdict; 0 for none. With
    `rubric`, the maximum for the whole grading; 0 then stands for 256."""
    judge_samples: int = Field(4, ge=1)
    """Number of sampled verdicts to average if a server gives no log-probabilities, with --no-judge-logprobs,
    and for `rubric`."""
    judge_logprobs: bool = True
    """Read label probabilities if the judge gives them; --no-judge-logprobs samples verdicts instead."""
    judge_max_tokens: int = Field(16, ge=1)
    """Maximum tokens of a sampled verdict; a model that thinks first needs more."""
    judge_temperature: float = Field(1.0, ge=0)
    """Temperature of sampled verdicts; 0 is greedy, so that all samples are the same."""
    judge_max_text: int = Field(8000, ge=100)
    """Maximum characters of each text that the judge sees; longer texts are truncated and counted."""
    judge_label_mass: float = Field(0.5, ge=0, le=1)
    """A verdict is unusable if the labels' total probability is below this."""
    judge_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the server's key. The key itself is never saved."""
    judge_panel: Names = ()
    """Further judges, spelled like `judge`. All are asked; the verdict is the mean of their probabilities (or
    scores), and `judge/members_disagree` is the share of questions on which they disagree."""
    judge_expert: str | None = None
    """Second judge, spelled like `judge`, that is asked about the pairs on which the first is unsure."""
    judge_unsure: float = Field(0.15, ge=0, le=0.5)
    """The first judge is unsure if its probability of the first text, the mean of both orders, is closer to
    1/2 than this, or missing."""
    judge_keys: Mapping[str, str] = Field(default_factory=dict)
    """Environment variables with the keys of further judges on other hosts than the first, such as
    `api.example.com=EXAMPLE_KEY`."""
    probe_pairs: int = Field(20, ge=0)
    """Pairs of the model's own completions on which a run tests the judge before the first step, in both
    orders; 0 for none. The verdicts count towards the limits; the test is skipped if it could use more than a
    tenth of one."""
    probe_data: Source | None = None
    """Pairs with chosen and rejected, of which the test takes as many to measure the judge's accuracy."""
    verdict_cache: Path | None = None
    """File of verdicts that several runs share, so that a verdict is paid for once."""
    max_verdicts: int | None = Field(None, ge=0)
    """Stop after this many verdicts (a verdict is a question in one order, with its retries); the run can be
    resumed."""
    max_judge_tokens: int | None = Field(None, ge=0)
    """Stop before the judge reads and writes more tokens than this; the run can be resumed."""
    max_cost: float | None = Field(None, ge=0)
    """Stop before the judge costs more dollars than this; the run can be resumed."""
    price_in: float | None = Field(None, ge=0)
    """Dollars per million tokens that the judge reads; default: the price in the package genai-prices. With
    several judges, the given prices hold for all of them."""
    price_out: float | None = Field(None, ge=0)
    """Dollars per million tokens that the judge writes; default: the price in the same package."""
    judge_concurrency: int = Field(16, ge=1)
    """Maximum number of concurrent requests to the server."""
    judge_requests_per_minute: int | None = Field(None, ge=1)
    """Maximum number of requests to the server per minute."""
    judge_tokens_per_minute: int | None = Field(None, ge=1)
    """Maximum number of tokens to the server per minute, by estimate."""
    judge_timeout: float = Field(60.0, gt=0)
    """Time limit of one request, in seconds."""
    judge_retries: int = Field(5, ge=0)
    """Number of retries if a request fails in transport."""
    judge_max_wait: float = Field(300.0, ge=0)
    """Longest wait before a retry that the server may ask for, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _judge_block(cls, given: Any) -> Any:
        """Accept the judge's options as one block: `judge: {model: ..., mode: ..., criteria: ...}`."""
        if not isinstance(given, dict) or not isinstance(given.get("judge"), Mapping):
            return given
        block = judge_block(given["judge"])
        if twice := sorted(block.keys() & (given.keys() - {"judge"})):
            raise ValueError(f"{twice[0]} is given both inside and outside the judge block, keep one")
        return {**given, "judge": None, **block}


def judge_block(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a judge's block: `model` is `judge`, and `mode` stands for `judge_mode`."""
    fields = {"model": "judge"} | {
        name.removeprefix("judge_"): name for name in JudgeConfig.model_fields if name != "judge"
    }
    named = {str(key).replace("-", "_"): value for key, value in block.items()}
    for name in named:
        if name not in fields and name not in fields.values():
            raise ValueError(f"judge has no option {name!r}; its options are {', '.join(fields)}")
    return {fields.get(name, name): value for name, value in named.items()}


class RewardConfig(JudgeConfig, Config):
    """Reward"""

    compares_pairs: ClassVar[bool] = False
    """True if the method asks its annotator only which of two completions is preferred."""

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
    label_noise: float = Field(0.0, ge=0, le=1)
    """For studies of weak annotators: share of comparisons of two completions whose winner is swapped. The
    reward of a completion is then its share of won comparisons. `eval_reward` has no noise."""

    @model_validator(mode="after")
    def _fill_penalty(self) -> Self:
        if self.missing_eos_penalty is None:
            by_model = any(str(spec).rpartition("*")[2].strip().startswith("model:") for spec in self.reward)
            # The configuration is frozen for its users, but it is still under construction here.
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
            own = {
                name: field.get_default(call_default_factory=True)
                for name, field in JudgeConfig.model_fields.items()
            }
            idle = next((name for name, default in own.items() if getattr(self, name) != default), None)
            if idle is not None:
                raise ValueError(f"{idle} is given without a judge; give judge, or leave it out")
        return self

    @model_validator(mode="after")
    def _noise_compares(self) -> Self:
        scores = getattr(self, "n", 2) == 1 or getattr(self, "compares_rewards", None) is not None
        if self.label_noise and scores and not self.compares_pairs:
            raise ValueError(
                f"label_noise is {self.label_noise}, but the method rates completions one by one or compares "
                "rewards of different prompts, and has no comparisons to swap; leave it out"
            )
        return self

    @property
    def annotator_penalty(self) -> float:
        """Return the penalty that the annotator subtracts; there is none in a preference."""
        return 0.0 if self.compares_pairs else self.missing_eos_penalty or 0.0

    @field_validator("reward", "eval_reward", mode="before")
    @classmethod
    def _rewards_at_home(cls, given: Any) -> Any:
        return expand_home(given)
