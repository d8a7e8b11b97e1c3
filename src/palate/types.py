"""The records that pass between the stages of a method. All are frozen; a stage returns new ones.

A `Prompt` and the texts beside it (`Comparison`, `Demonstration`) know no tokenizer. Everything a
model has sampled or is to learn from carries token ids of that model's tokenizer, so nothing is
ever tokenised twice: `Completion`, and the records that hold completions (`Group`, `Pair`, `Example`).
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
"""Why sampling ended: an end token, a stop text, or the limit on new tokens; only "length" is unfinished."""


@dataclass(frozen=True)
class Prompt:
    """What is asked. `columns` are the data row's other columns, passed on to reward functions."""

    content: Content
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)
    """Where it was read, such as `prompts.jsonl:12`, for messages."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Values for the chat template beside the turns: `tools`, and a row's own template arguments."""
    token_ids: tuple[int, ...] | None = field(default=None, compare=False)
    """The tokens before a completion from data, where these differ from the tokens that sampling starts
    after; else None. They belong to one model's tokenizer."""

    @cached_property
    def id(self) -> str:
        """Key of the content (and of the variables, if any): 16 hex digits, the same in every process."""
        content = _plain(self.content)
        facts = [content, dict(self.variables)] if self.variables else content
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    @property
    def text(self) -> str:
        """The content as text: the last turn of a conversation. For display, and for rules."""
        return self.content if isinstance(self.content, str) else said(self.content[-1])

    def to_sample(self) -> Prompt:
        """Return the same prompt as sampling starts from it, without the tokens of a row of data."""
        return self if self.token_ids is None else replace(self, token_ids=None)


@dataclass(frozen=True)
class Comparison:
    """A data row that says which of two texts is the better one; untokenised."""

    prompt: Prompt
    chosen: Content
    rejected: Content
    margin: float | None = None
    """How much better, where the data say so."""
    chosen_finish: Finish = "eos"
    rejected_finish: Finish = "eos"
    """Why each text ends where it does; a text that was cut ("length") gets no end token."""


@dataclass(frozen=True)
class Demonstration:
    """A data row that shows what to answer; untokenised."""

    prompt: Prompt
    completion: Content
    finish: Finish = "eos"
    """Why the completion ends where it does; one that was cut ("length") gets no end token."""


@dataclass(frozen=True)
class Completion:
    """An answer as tokens. `text` leaves out the end token and a stop string; `token_ids` has them."""

    text: str
    token_ids: tuple[int, ...]
    finish: Finish = "eos"
    policy_version: int | None = None
    """Version of the snapshot that sampled it; None if it came from data."""
    logps: tuple[float, ...] | None = field(default=None, compare=False)
    """Log-probability of each token under the model that sampled it (temperature 1, nothing cut off)."""
    sampling_logps: tuple[float, ...] | None = field(default=None, compare=False)
    """The same under the distribution drawn from (after temperature, top-k and the like)."""

    def __post_init__(self) -> None:
        """A completion without tokens has no probability and cannot be learnt from."""
        assert self.token_ids, "a completion has at least one token"


@dataclass(frozen=True)
class Group:
    """A prompt and its completions, with a reward each once annotated.

    A reward of None marks a completion for which the annotator gave nothing usable; such a
    completion is never chosen or rejected.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float | None, ...] | None = None
    parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict, compare=False)
    """The rewards by annotator name, where several were weighed together."""

    def annotated(self, rewards: tuple[float | None, ...], **parts: tuple[float | None, ...]) -> Group:
        """The same group with rewards, one per completion."""
        assert len(rewards) == len(self.completions), "one reward per completion"
        return replace(self, rewards=rewards, parts={**self.parts, **parts})


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, the first preferred."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    margin: float | None = None
    """Reward of chosen minus reward of rejected, > 0 where known."""

    @property
    def completions(self) -> tuple[Completion, Completion]:
        """Chosen, rejected: the order in which a learner returns their numbers."""
        return (self.chosen, self.rejected)


@dataclass(frozen=True)
class Example:
    """A prompt with the one completion to imitate or to score."""

    prompt: Prompt
    completion: Completion

    @property
    def completions(self) -> tuple[Completion]:
        """The one completion."""
        return (self.completion,)


@dataclass(frozen=True)
class AnchoredPair:
    """A pair, and another completion of its prompt that is to stay likely while the pair is learnt."""

    pair: Pair
    anchor: Completion

    @property
    def prompt(self) -> Prompt:
        """What all three answer."""
        return self.pair.prompt

    @property
    def completions(self) -> tuple[Completion, Completion, Completion]:
        """Chosen, rejected, anchor."""
        return (*self.pair.completions, self.anchor)


class Record(Protocol):
    """The prompt and its k completions that one row of an update holds.

    This is all that a learner reads. `Group`, `Pair`, `Example` and `AnchoredPair` are records, and so is any
    class with these two attributes. What else a record carries (rewards, a margin, advantages of its tokens)
    is between the method that makes it and the objective that reads it.
    """

    @property
    def prompt(self) -> Prompt:
        """The prompt of all completions."""

    @property
    def completions(self) -> tuple[Completion, ...]:
        """The completions, in the order in which a learner returns their numbers."""


def said(turn: Message) -> str:
    """The text of a chat turn; empty for a turn that only calls tools."""
    content = turn.get("content")
    return content if isinstance(content, str) else ""


def _plain(content: Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [dict(turn) for turn in content]
