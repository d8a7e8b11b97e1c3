"""Rows to records: TRL's column formats, standard (texts) and conversational (lists of chat turns).

In a record a standard text stays an unchanged str; a conversation is a tuple of turns, and its answer is a
tuple of one assistant turn. A row that mixes them becomes a conversation: a text prompt is then one user
turn. Names of columns are in `columns`, those of other toolkits in `dialects`.

`columns={"prompt": "question"}` maps our names to the data's. Every reader raises DataError for a source that
it cannot use. With an `account`, it skips and counts rows that cannot be used, and raises an error if they
are too many; it also counts unused parts. Without an account, the first such row raises its error, which
names the file and the line.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from palate.data.account import Account
from palate.data.beginnings import agreement, shared_text
from palate.data.columns import Fields, read_fields
from palate.data.rows import scan_rows
from palate.data.turns import Turns, is_marked
from palate.errors import DataError
from palate.types import Comparison, Content, Demonstration, Prompt, said

T = TypeVar("T")

_AS_NAMED: Mapping[str, str] = MappingProxyType({})

_LISTED = "; `palate methods` lists the data that each method needs."
_NEEDS = {
    "prompts": f"Prompts need the column prompt or messages{_LISTED}",
    "pairs": f"Preference pairs need the columns chosen and rejected{_LISTED}",
    "demonstrations": f"Demonstrations need the columns prompt and completion, or messages, or text{_LISTED}",
}
"""Advice for data without a usable row, by kind of data."""

SAME = "chosen and rejected are the same"
MARKED = "marked not to be learnt (label, weight, train or loss)"


def read_prompts(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = _AS_NAMED,
    limit: int | None = None,
    account: Account | None = None,
) -> list[Prompt]:
    """Return the prompt of each row; its other columns become `Prompt.columns`, for reward functions.

    Without a `prompt`, it is the turns of `messages` before the last assistant turn (all of them if they
    end in a user's turn), or the common beginning of `chosen` and `rejected`. If a prompt ends in a begun
    turn of the assistant, completions continue that turn.
    """
    account = account or Account(strict=True)
    return list(_scan(source, account, _prompt, "prompts", split=split, columns=columns, limit=limit))


def read_comparisons(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = _AS_NAMED,
    limit: int | None = None,
    account: Account | None = None,
    marked: bool = False,
) -> tuple[list[Comparison], int]:
    r"""Return the comparisons in rows with `chosen`, `rejected`, a prompt and an optional number `margin`,
    and the number of rows left out because chosen and rejected are the same. Show that number: such a
    row contains no preference, and many of them mean that the data are faulty.

    Without a `prompt`, it is the common beginning of chosen and rejected: all shared turns, the text up to
    the last shared "\n\nAssistant:" (Anthropic's HH), or all shared words. With `messages`, chosen and
    rejected that are one turn or a text each answer the messages. Rows with a false `label` are left out,
    unless `marked` includes them. Raises DataError too if no row is left.
    """
    account = account or Account(strict=True)
    options: dict[str, Any] = {"split": split, "columns": columns, "limit": limit, "marked": marked}
    kept = list(scan_comparisons(source, account=account, **options))
    return kept, account.dropped[SAME].count if SAME in account.dropped else 0


def scan_comparisons(
    source: str, *, account: Account, marked: bool = False, **options: Any
) -> Iterator[Comparison]:
    """Yield the comparisons of `read_comparisons` one by one; the account is checked after the last."""
    read, kept = partial(_comparison, marked=marked), 0
    for comparison in _scan(source, account, read, "pairs", **options):
        kept += 1
        yield comparison
    if not kept and MARKED in account.dropped:
        lost = ", ".join(f"{tally.count} {reason}" for reason, tally in account.dropped.items())
        raise DataError(f"{source}: no pair is left to learn from: {lost}; expected at least one.")
    if not kept:
        raise DataError(
            f"{source}: chosen and rejected are the same in all {account.dropped[SAME].count} rows; expected "
            "a better and a worse text. Look for the right columns and name them with --map chosen=NAME."
        )


def read_demonstrations(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = _AS_NAMED,
    limit: int | None = None,
    account: Account | None = None,
    marked: bool = False,
) -> list[Demonstration]:
    """Return demonstrations: `prompt` with `completion`; or `messages`, whose last assistant turn that may be
    learnt is the completion, without the turns after it; or `text`, which is learnt unchanged, as a
    completion of the empty prompt. Rows with a false `label` are left out, unless `marked` includes them.
    """
    account = account or Account(strict=True)
    options: dict[str, Any] = {"split": split, "columns": columns, "limit": limit, "marked": marked}
    return list(scan_demonstrations(source, account=account, **options))


def scan_demonstrations(
    source: str, *, account: Account, marked: bool = False, **options: Any
) -> Iterator[Demonstration]:
    """Yield the rows of `read_demonstrations` one by one; the account is checked after the last."""
    read, kept = partial(_demonstration, marked=marked), 0
    for demonstration in _scan(source, account, read, "demonstrations", **options):
        kept += 1
        yield demonstration
    if not kept:
        raise DataError(f"{source}: no row is left to learn from: all are {MARKED}; expected at least one.")


def _scan(
    source: str,
    account: Account,
    record: Callable[[Fields], T | None],
    kind: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = _AS_NAMED,
    limit: int | None = None,
) -> Iterator[T]:
    sound = 0
    for row in read_fields(source, scan_rows(source, split=split, limit=limit), columns, account):
        try:
            made = record(row)
        except DataError as error:
            account.skip(error)
            continue
        sound += 1
        if made is not None:
            for name in _prompt_of(made).columns:
                account.leave(f"column '{name}'", row.row.where)
            yield made
    account.check(source, sound, _NEEDS[kind])


def _prompt_of(record: object) -> Prompt:
    return record if isinstance(record, Prompt) else record.prompt  # type: ignore[attr-defined]


def _prompt(row: Fields) -> Prompt:
    if "prompt" not in row.values and "messages" in row.values:
        return _record(row, _waiting(row), "messages")
    if "prompt" not in row.values and "chosen" in row.values and "rejected" in row.values:
        content, chosen, rejected = _split(row, row.content("chosen"), row.content("rejected"))
        record = _record(row, _with_system(row, content))
        # As columns they contain only the answers, without the prompt.
        texts = {"chosen": chosen, "rejected": rejected}
        own = {
            column: text if isinstance(text, str) else list(text)
            for ours, text in texts.items()
            for column in row.names[ours]
        }
        return replace(record, columns={**record.columns, **own})
    return _record(row, _asked(row), "prompt")


def _comparison(row: Fields, *, marked: bool) -> Comparison | None:
    if not marked and _is_false(row.values.get("label"), number=False):
        row.account.drop(MARKED, row.row.where)
        return None
    for name in ("chosen", "rejected"):
        if name not in row.values:
            raise row.missing(name, "a text or a list of chat turns")
    chosen, rejected = row.content("chosen"), row.content("rejected")
    if chosen == rejected:
        row.account.drop(SAME, row.row.where)
        return None
    read = ["chosen", "rejected", "margin", *(() if marked else ("label",))]
    if "prompt" in row.values:
        read.append("prompt")
        content, chosen, rejected = _join(row, _asked(row), chosen, rejected)
    elif "messages" in row.values and _is_answer(chosen) and _is_answer(rejected):
        read.append("messages")
        content, chosen, rejected = _join(row, _waiting(row), chosen, rejected)
    else:
        content, chosen, rejected = _split(row, chosen, rejected)
        content = _with_system(row, content)
        if not isinstance(content, str):
            chosen, rejected = _as_turns(chosen, "assistant"), _as_turns(rejected, "assistant")
    if chosen == rejected:  # they differed only in form
        row.account.drop(SAME, row.row.where)
        return None
    if _is_empty(chosen):
        raise row.fault("chosen is empty", "the better text; leave the row out")
    if _is_empty(rejected):
        row.note("rejected is empty")
    margin = _margin(row)
    finishes = row.finish("chosen_finish"), row.finish("rejected_finish")
    return Comparison(_record(row, content, *read), chosen, rejected, margin, *finishes)


def _demonstration(row: Fields, *, marked: bool) -> Demonstration | None:
    if not marked and _is_false(row.values.get("label"), number="text" not in row.values):
        row.account.drop(MARKED, row.row.where)
        return None
    content: Content
    completion: Content
    read: tuple[str, ...]
    if "completion" in row.values:
        read = ("prompt", "completion")
        content, completion = _asked(row), row.content("completion")
        if not (isinstance(content, str) and isinstance(completion, str)):
            content = _as_turns(content, "user")
            completion = _answer(row, "completion", content)
    elif "messages" in row.values:
        read = ("messages",)
        turns = row.turns("messages")
        last = _last_to_learn(row, turns)
        if last is None:
            return None
        content, completion = _open(row, "messages", turns[:last]), turns[last : last + 1]
    elif "text" in row.values:
        read = ("text",)
        content, completion = "", row.content("text")
        if not isinstance(completion, str):
            raise row.fault("text is a list", "a text; a list of turns is named by --map messages=text")
    else:
        raise row.missing("completion", "prompt with completion, messages, or text")
    if _is_empty(completion):
        raise row.fault("the completion is empty", "something to imitate")
    finish = row.finish("finish")
    return Demonstration(_record(row, content, *read, *(() if marked else ("label",))), completion, finish)


def _last_to_learn(row: Fields, turns: Turns) -> int | None:
    """Return the index of the last answer that is not marked; None if all are marked."""
    given = row.listed("messages")
    before = len(turns) - len(given)  # the system turn of another column, and the history
    answers = [at for at, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise row.fault("messages have no turn of the assistant", "one to imitate")
    free = [at for at in answers if at < before or not is_marked(given[at - before])]
    if not free:
        row.account.drop(MARKED, row.row.where)
        return None
    if free[-1] != answers[-1]:
        row.note("the last answer is marked not to be learnt; an earlier one is learnt")
    if free[-1] != len(turns) - 1:
        row.account.leave("turns after the answer that is learnt", row.row.where)
    return free[-1]


def _record(row: Fields, content: Content, *read: str) -> Prompt:
    variables = row.variables()
    return Prompt(content, row.rest(*read), row.row.where, variables)


def _with_system(row: Fields, content: Content) -> Content:
    """Return the shared prompt of chosen and rejected, after the row's system turn if it has one."""
    turns = _as_turns(content, "user")
    whole = row.with_system(turns)
    return content if len(whole) == len(turns) else whole


def _asked(row: Fields) -> Content:
    """Return the prompt column."""
    if "prompt" not in row.values:
        raise row.missing("prompt", "a text or a list of chat turns to answer")
    content = row.content("prompt")
    if not isinstance(content, str):
        if content[-1]["role"] == "assistant" and len(content) > 1 and said(content[-1]).strip():
            row.note("prompts end with the beginning of an answer, which completions continue")
            return content
        return _open(row, "prompt", content)
    if not content.strip():
        raise row.fault("prompt is an empty text", "something to answer")
    return content


def _waiting(row: Fields) -> Turns:
    """Return the turns of messages before the assistant turn to learn or to generate."""
    turns = row.turns("messages")
    return _open(row, "messages", turns[:-1] if turns[-1]["role"] == "assistant" else turns)


def _open(row: Fields, name: str, turns: Turns) -> Turns:
    """Check that the turns of that column end where the assistant answers."""
    if not turns:
        raise row.fault(f"{name} has no turn to answer", "a turn of the user before the assistant's")
    if turns[-1]["role"] not in ("user", "tool"):
        raise row.fault(
            f"in {name} the turn to answer is a turn of the {turns[-1]['role']}",
            "one of the user (or of a tool)",
        )
    if not said(turns[-1]).strip() and turns[-1]["role"] == "user":
        raise row.fault(f"in {name} the turn to answer is empty", "something to answer")
    return turns


def _join(
    row: Fields, prompt: Content, chosen: Content, rejected: Content
) -> tuple[Content, Content, Content]:
    """Return a given prompt with its two answers, either all as texts or all as turns."""
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    if isinstance(prompt, str) and not _is_answer(chosen) and not _is_answer(rejected):
        shared, first, second = _split(row, chosen, rejected)  # UltraFeedback repeats the prompt as turns
        if all(said(turn).strip() != prompt.strip() for turn in _as_turns(shared, "user")):
            raise row.fault("prompt is not among the turns that chosen and rejected share", "the same prompt")
        return shared, first, second
    turns = _as_turns(prompt, "user")
    return turns, _answer(row, "chosen", turns), _answer(row, "rejected", turns)


def _answer(row: Fields, name: str, prompt: Turns) -> Turns:
    """Return the one assistant turn of a column, which may have the prompt's turns before it."""
    turns = _as_turns(row.content(name), "assistant")
    if turns[: len(prompt)] == prompt:
        turns = turns[len(prompt) :]
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in turns) or "nothing"
        raise row.fault(f"after the prompt, {name} has the turns: {roles}", "exactly one, of the assistant")
    return turns


def _split(row: Fields, chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """Return the common prompt of chosen and rejected, and the rest of each."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = shared_text(chosen, rejected)
        if not chosen[:cut].strip():
            raise row.missing("prompt", "one, or the same words at the start of chosen and rejected")
        return chosen[:cut], chosen[cut:], rejected[cut:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise row.missing("prompt", "one, where chosen or rejected is a text and the other is not")
    cut = min(agreement(chosen, rejected), len(chosen) - 1, len(rejected) - 1)  # leaves a turn in each
    if not cut:
        raise row.missing("prompt", "one, or the same first turns in chosen and rejected")
    prompt = _open(row, "chosen", chosen[:cut])
    return prompt, _answer(row, "chosen", prompt), _answer(row, "rejected", prompt)


def _margin(row: Fields) -> float | None:
    """Return the row's margin of chosen over rejected, if it has a valid one."""
    margin = row.values.get("margin")
    if isinstance(margin, str):
        try:
            margin = float(margin)
        except ValueError:
            margin = math.nan
    if margin is None:
        return None
    if (
        isinstance(margin, bool)
        or not isinstance(margin, int | float)
        or not 0 <= margin <= sys.float_info.max
    ):
        row.note("margin is not a number of 0 or more; it is ignored")
        return None
    return float(margin)


def _is_empty(content: Content) -> bool:
    if isinstance(content, str):
        return not content.strip()
    return not said(content[0]).strip() and set(content[0]) <= {"role", "content"}


def _is_false(label: object, *, number: bool) -> bool:
    """Return whether a label marks a bad answer; 0 counts if `number`, as in files without truth values.

    In rows of `text` a number is usually the class of the text, such as the mood of a review.
    """
    if isinstance(label, str):
        return label.strip().lower() in ({"false", "0"} if number else {"false"})
    return label is False or (number and isinstance(label, int | float) and label == 0)


def _is_answer(content: Content) -> bool:
    """Return True for an answer without a prompt before it."""
    return isinstance(content, str) or len(content) == 1


def _as_turns(content: Content, role: str) -> Turns:
    return ({"role": role, "content": content},) if isinstance(content, str) else content
