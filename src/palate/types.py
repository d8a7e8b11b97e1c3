"""The records that pass between the stages of a method. All are frozen; a stage returns new records.

`Prompt`, `Comparison` and `Demonstration` hold text without tokens. `Completion`, and the records that hold
completions (`Group`, `Pair`, `Example`), have the token ids of the model that samples them or learns from
them, so no text is tokenised twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

Message = Mapping[str, Any]
"""One chat turn, `{"role": ..., "content": ...}`. A turn may have further keys that a chat template reads,
such as `reasoning_content` or `tool_calls`; a turn that only calls tools may have no content."""

Content = str | tuple[Message, ...]
"""A text (*standard* format) or a list of chat turns (*conversational* format)."""

Finish = Literal["eos", "stop", "length"]
"""The reason why sampling ended: an end token, a stop text, or the token limit ("length": truncated)."""


@dataclass(frozen=True)
class Prompt:
    """A prompt. `columns` are the data row's other columns, which reward functions receive."""

    content: Content
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)
    """Source of the prompt, such as `prompts.jsonl:12`, for messages."""
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Values for the chat template besides the turns: `tools`, and a row's own template arguments."""
    token_ids: tuple[int, ...] | None = field(default=None, compare=False)
    """The tokens before a completion from data, if they differ from the tokens that sampling starts after;
    else None. They belong to one model's tokenizer."""

    @cached_property
    def id(self) -> str:
        """Key of the content (and of the variables, if any): 16 hex digits, the same in every process."""
        content = _plain(self.content)
        facts = [content, dict(self.variables)] if self.variables else content
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    @property
    def text(self) -> str:
        """The content as text, for display and for rules: the whole text or the last turn."""
        return self.content if isinstance(self.content, str) else said(self.content[-1])

    def to_sample(self) -> Prompt:
        """Return the same prompt as sampling starts from it, without the tokens of a row of data."""
        return self if self.token_ids is None else replace(self, token_ids=None)


@dataclass(frozen=True)
class Comparison:
    """A data row with a better and a worse text for a prompt; not tokenised."""

    prompt: Prompt
    chosen: Content
    rejected: Content
    margin: float | None = None
    """Degree of preference; None if the data have none."""
    chosen_finish: Finish = "eos"
    rejected_finish: Finish = "eos"
    """Why each text ends where it does; a text that was cut ("length") gets no end token."""


@dataclass(frozen=True)
class Demonstration:
    """A data row with an answer to imitate; not tokenised."""

    prompt: Prompt
    completion: Content
    finish: Finish = "eos"
    """Why the completion ends where it does; one that was cut ("length") gets no end token."""


@dataclass(frozen=True)
class Completion:
    """An answer as tokens. `text` excludes the end token and a stop text; `token_ids` includes them."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish = "eos"
    policy_version: int | None = None
    """Version of the snapshot that sampled the completion; None for completions from data."""
    logps: tuple[float, ...] | None = field(default=None, compare=False)
    """Log-probability of each token under the sampling model (temperature 1, all tokens allowed)."""
    sampling_logps: tuple[float, ...] | None = field(default=None, compare=False)
    """Log-probability of each token under the sampling distribution (after temperature, top-k, ...)."""

    def __post_init__(self) -> None:
        """Check for tokens: a completion without tokens has no probability and cannot be learnt from."""
        assert self.token_ids, "a completion needs at least one token"


@dataclass(frozen=True)
class Group:
    """A prompt and its completions; after annotation, with one reward each.

    A reward of None means that the annotator returned no usable reward; such a completion is never chosen or
    rejected.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...] | None = None
    parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict, compare=False)
    """The rewards by annotator name, if several annotators are combined."""

    def annotated(self, rewards: tuple[float | None, ...], **parts: tuple[float | None, ...]) -> Group:
        """Return the group with rewards, one per completion."""
        assert len(rewards) == len(self.completions), "one reward per completion"
        return replace(self, rewards=rewards, parts={**self.parts, **parts})


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt: chosen and rejected."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    margin: float | None = None
    """Reward of chosen minus reward of rejected, > 0; None if unknown."""

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """Chosen and rejected, in the order of a learner's outputs."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class LabelledPair:
    """Two completions of one prompt with a soft label, which a judge gave."""

    prompt: Prompt
    first: Completion
    second: Completion
    p: float
    """Probability that the first is preferred, in [0, 1]."""

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """First and second, in the order of a learner's outputs."""
        return (self.first, self.second)


@dataclass(frozen=True)
class Example:
    """A prompt with one completion to imitate or to score."""

    prompt: Prompt
    completion: Completion

    @property
    def completions(self) -> tuple[Completion]:
        """The completion, as a tuple."""
        return (self.completion,)


@dataclass(frozen=True)
class AnchoredPair:
    """A pair, and another completion of its prompt that training keeps likely."""

    pair: Pair
    anchor: Completion

    @property
    def prompt(self) -> Prompt:
        """The prompt of all three completions."""
        return self.pair.prompt

    @property
    def completions(self) -> tuple[Completion, Completion, Completion]:
        """Chosen, rejected and anchor."""
        return (*self.pair.completions, self.anchor)


class Record(Protocol):
    """A prompt and its k completions: one row of an update.

    A learner reads only these two attributes. `Group`, `Pair`, `LabelledPair`, `Example` and `AnchoredPair`
    are records, and so is any class with both attributes. Further attributes (rewards, a margin, advantages)
    are for the objective.
    """

    @property
    def prompt(self) -> Prompt:
        """The prompt of all completions."""

    @property
    def completions(self) -> tuple[Completion, ...]:
        """The completions, in the order of a learner's outputs."""


def said(turn: Message) -> str:
    """The text of a chat turn; empty for a turn that only calls tools."""
    content = turn.get("content")
    return content if isinstance(content, str) else ""


def _plain(content: Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [dict(turn) for turn in content]
