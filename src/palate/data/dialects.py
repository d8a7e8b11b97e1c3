"""Rows of other toolkits under our column names.

- Llama-Factory and Alpaca: `instruction`, `input`, `output` (a text, or the better and the worse text),
  `system`, `history`; ShareGPT: `conversations` of `from` and `value`, `system`, `tools`, `kto_tag`.
- Dolly: `instruction`, `context`, `response`.
- ms-swift: `messages` or `query` and `response`, `rejected_response`, `rejected_messages`, `system`,
  `history`, `label`.
- OpenAI fine-tuning: `messages`, `tools`; `input` with messages, `preferred_output`, `non_preferred_output`.
- distilabel and UltraFeedback: `instruction`, `generation`, `generations` with `ratings`, `completions` with
  scores, `system_prompt`.
- RLHFlow: `prompt`, `responses`, `rewards`.

Our own names in the same row and a map have priority. `question`, `problem` and `answer` need a map: such
rows often need a second column (a context, a choice of answers), and nobody would notice that it is left out.
The error for them names the map to give.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Value = tuple[Any, tuple[str, ...]]
"""A value under our name, and the row's own columns from which it is made."""


@dataclass(frozen=True)
class Foreign:
    """A row's filled columns that neither our names nor a map use, and our names that are taken."""

    columns: Mapping[str, Any]
    taken: frozenset[str]

    def has(self, *names: str) -> bool:
        """Return True if the row has all these columns."""
        return all(name in self.columns for name in names)

    def first(self, *names: str) -> Value | None:
        """Return the first of these columns that the row has."""
        return next(((self.columns[name], (name,)) for name in names if name in self.columns), None)


@dataclass(frozen=True)
class Lines:
    """Texts of several columns that form one text, joined by line breaks without the empty ones."""

    columns: Mapping[str, Any]


def translate(row: Foreign) -> dict[str, Value]:
    """Return the row's columns under our names, except for names that are already taken."""
    translated: dict[str, Value] = {}
    for rule in _RULES:
        for name, value in rule(row, translated):
            if name not in row.taken and name not in translated:
                translated[name] = value
    return translated


Rule = Callable[[Foreign, Mapping[str, Value]], Iterator[tuple[str, Value]]]


def _openai_preference(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    better = row.first("preferred_output", "preferred_completion")
    worse = row.first("non_preferred_output", "non_preferred_completion")
    if better and worse:
        yield "chosen", better
        yield "rejected", worse
    dialogue = row.columns.get("input")
    if isinstance(dialogue, Mapping) and dialogue.get("messages"):
        yield "messages", (dialogue["messages"], ("input",))
        if dialogue.get("tools"):
            yield "tools", (dialogue["tools"], ("input",))


def _conversations(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    listed = row.first("conversations", "conversation")
    if listed is None:
        return
    turns, names = listed
    if isinstance(turns, list) and turns and all(isinstance(t, Mapping) and "human" in t for t in turns):
        pairs = [(("user", turn["human"]), ("assistant", turn.get("assistant"))) for turn in turns]
        turns = [{"role": role, "content": said} for pair in pairs for role, said in pair if said is not None]
    yield "messages", (turns, names)


def _ms_swift(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    if "messages" in row.taken and row.has("rejected_messages"):
        yield "chosen", (MESSAGES, ("messages",))
        yield "rejected", (row.columns["rejected_messages"], ("rejected_messages",))
        return
    worse = row.first("rejected_response")
    if worse is not None:
        yield "rejected", worse
        better = row.first("chosen_response", "response")
        if better is not None:
            yield "chosen", better
        elif "messages" in row.taken | done.keys():
            yield "chosen", (LAST_ANSWER, ())
    if row.has("query") and (row.has("response") or row.has("rejected_response")):
        yield "prompt", (row.columns["query"], ("query",))


MESSAGES, LAST_ANSWER = object(), object()
"""Placeholders for the row's `messages` and for the last answer in them."""


def _alpaca(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    if not row.has("instruction"):
        return
    more = "context" if row.has("context", "response") and not row.has("input") else "input"  # as in Dolly
    names = ("instruction", more) if row.has(more) else ("instruction",)
    yield "prompt", (Lines({name: row.columns[name] for name in names}), names)
    output = row.columns.get("output")
    if isinstance(output, list) and len(output) == 2:
        yield "chosen", (output[0], ("output",))
        yield "rejected", (output[1], ("output",))
    elif output is not None:
        yield "completion", (output, ("output",))


def _answers(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    known = row.taken | done.keys()
    if (
        isinstance(row.columns.get("input"), str)
        and "prompt" not in known
        and (known >= {"chosen", "rejected"} or row.has("generations"))
    ):
        yield "prompt", (row.columns["input"], ("input",))
    if row.columns.get("context") and not (row.has("instruction", "response") and not row.has("input")):
        return  # the question is incomplete without it
    has_question = row.has("query") or row.has("instruction")
    answer = row.first("response", "generation") if has_question else row.first("generation")
    if answer is not None and "prompt" in known:
        yield "completion", answer


def _scored(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """Yield the best and the worst of several answers, each with a score."""
    if row.taken & {"chosen", "rejected"}:
        return
    for texts_in, scores_in in (
        ("generations", "ratings"),
        ("generations", "rating"),
        ("responses", "rewards"),
    ):
        texts, scores = row.columns.get(texts_in), row.columns.get(scores_in)
        if isinstance(texts, list) and isinstance(scores, list) and len(texts) == len(scores):
            yield from _best_and_worst(texts, scores, (texts_in, scores_in))
            return
    listed = row.columns.get("completions")
    if isinstance(listed, list) and all(isinstance(each, Mapping) and "response" in each for each in listed):
        for key in ("overall_score", "fine-grained_score"):
            scores = [each.get(key) for each in listed]
            if any(score is not None for score in scores):
                yield from _best_and_worst([each["response"] for each in listed], scores, ("completions",))
                return


def _best_and_worst(
    texts: list[Any], scores: list[Any], names: tuple[str, ...]
) -> Iterator[tuple[str, Value]]:
    usable = [(float(s), n) for n, s in enumerate(scores) if _is_number(s) and texts[n] is not None]
    if len(usable) < 2:
        return
    best, worst = max(usable, key=lambda u: (u[0], -u[1])), min(usable, key=lambda u: (u[0], u[1]))
    yield "chosen", (texts[best[1]], names)
    yield "rejected", (texts[worst[1]] if best[0] > worst[0] else texts[best[1]], names)
    yield "margin", (best[0] - worst[0], names)


def _around(row: Foreign, done: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    for ours, theirs in (
        ("system", ("system_prompt",)),
        ("tools", ("functions",)),
        ("label", ("kto_tag",)),
        ("finish", ("finish_reason",)),
    ):
        value = row.first(*theirs)
        if value is not None:
            yield ours, value


_RULES: tuple[Rule, ...] = (
    _openai_preference,
    _conversations,
    _ms_swift,
    _alpaca,
    _answers,
    _scored,
    _around,
)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
