"""The rows of a pool: Parquet files with TRL's columns, from which the sampled tokens are read back.

A row is a completion. A prompt without completions has one row with its error. `prompt`, `completion`,
`reward` and the data's own columns are for any reader; the columns in `OURS` are for Palate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palate.data import column_type
from palate.errors import RunError
from palate.memory import key_of
from palate.run.status import sync
from palate.rundir.writing import writing
from palate.types import Completion, Content, Prompt

FIXED = {
    "reward": pa.float64(),
    "reward_parts": pa.string(),
    "error": pa.string(),
    "finish": pa.string(),
    "tokens": pa.int32(),
    "logp": pa.float64(),
}
"""Columns for any reader, besides the texts. `reward_parts` is a JSON object if several rewards are added."""

OURS = {
    "prompt_row": pa.int32(),
    "prompt_key": pa.string(),
    "prompt_tokens": pa.string(),
    "sample": pa.int32(),
    "token_ids": pa.list_(pa.int32()),
    "logps": pa.list_(pa.float32()),
    "sampling_logps": pa.list_(pa.float32()),
}
"""Columns that Palate reads: the prompt's number, keys of its content and of its tokens, and the tokens."""

_IDS: dict[int, int] = {}
"""An object for each token id that was read."""


@dataclass(frozen=True)
class Entry:
    """The completions of one prompt in a pool.

    Attributes:
        row: number of the prompt in the pool.
        key: key of the prompt's content, with its columns.
        tokens: key of the prompt's tokens.
        completions: its completions; none if it cannot be sampled.
        rewards: one per completion; None before they are scored.
        parts: the rewards by annotator name, if several are added.
        errors: for each completion the reason for a bad row, or None.
        error: the reason why there are no completions.
    """

    row: int
    key: str
    tokens: str
    completions: tuple[Completion, ...] = ()
    rewards: tuple[float | None, ...] | None = None
    parts: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)
    errors: tuple[str | None, ...] = ()
    error: str | None = None


def prompt_key(prompt: Prompt) -> str:
    """Return a key of a prompt's content and of the columns that a reward may read."""
    return key_of(prompt.id, dict(prompt.columns))


class Columns:
    """The columns of texts and data, with one type for all files of a pool.

    In a column whose values have no common type, values that are no texts are written as JSON.

    Args:
        prompts: all prompts of the pool.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        contents = [_plain(prompt.content) for prompt in prompts]
        self._as_json = {name for name, values in self._given(prompts) if column_type(values) is None}
        mixed = len({type(content) for content in contents}) > 1
        if mixed or column_type(contents) is None:
            self._as_json.add("prompt")
        texts = all(isinstance(content, str) for content in contents)
        turn = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
        self._chat = not texts and "prompt" not in self._as_json
        own = {name: column_type(values) or pa.string() for name, values in self._given(prompts)}
        self.schema = pa.schema(
            {
                "prompt": pa.string() if "prompt" in self._as_json else column_type(contents),
                "completion": turn if self._chat else pa.string(),
                **FIXED,
                **own,
                **OURS,
            }
        )

    @staticmethod
    def _given(prompts: Sequence[Prompt]) -> Iterator[tuple[str, list[Any]]]:
        """Yield the columns of the data, under the names that they get in the files."""
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        for name in names:
            yield _name(name), [prompt.columns.get(name) for prompt in prompts]
        for name in dict.fromkeys(name for prompt in prompts for name in prompt.variables):
            # Tools and template arguments differ in form from row to row.
            yield _name(name), [_json(prompt.variables.get(name)) for prompt in prompts]

    def texts(self, prompt: Prompt, completion: Completion | None) -> dict[str, Any]:
        """Return the columns of texts and data of one row."""
        content = _plain(prompt.content)
        values: dict[str, Any] = {"prompt": _json(content) if "prompt" in self._as_json else content}
        if completion is None:
            values["completion"] = None
        elif self._chat:
            values["completion"] = [{"role": "assistant", "content": completion.text}]
        else:
            values["completion"] = completion.text
        for name, value in prompt.columns.items():
            values[_name(name)] = _json(value) if _name(name) in self._as_json else value
        return values | {_name(name): _json(value) for name, value in prompt.variables.items()}


def write_shard(path: Path, entries: Sequence[Entry], prompts: Sequence[Prompt], columns: Columns) -> None:
    """Write a shard completely or not at all; a second write of the same shard replaces the first.

    Args:
        path: the file.
        entries: the shard's entries.
        prompts: all prompts of the pool, in order.
        columns: the types of the columns.

    Raises:
        RunError: the file cannot be written.
    """
    rows = [row for entry in entries for row in _rows(entry, prompts[entry.row], columns)]
    table = pa.Table.from_pylist(rows, schema=columns.schema)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # workers may write the same shard
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        try:
            with part.open("wb") as file:
                pq.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


def read_shard(path: Path, *, keys: frozenset[str] | None = None, n: int | None = None) -> list[Entry]:
    """Return the entries of a shard, in order.

    Args:
        path: the file.
        keys: keys of the prompts to return; None for all.
        n: number of completions to return of each prompt; None for all.

    Raises:
        RunError: the file cannot be read.
    """
    names = [*OURS, "completion", "finish", "reward", "reward_parts", "error"]
    try:
        table = pq.read_table(path, columns=names)
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"the pool's file {str(path)!r} cannot be read: {error}; restore a good copy"
        ) from error
    columns = (table.column(name).to_pylist() for name in ("prompt_key", "sample"))
    wanted = [
        (keys is None or key in keys) and (n is None or (sample or 0) < n)
        for key, sample in zip(*columns, strict=True)
    ]
    table = table.filter(pa.array(wanted, pa.bool_())).combine_chunks()
    values = {name: _values(table.column(name)) for name in names}
    values["token_ids"] = [None if ids is None else _shared(ids) for ids in values["token_ids"]]
    together: dict[int, list[int]] = {}
    for i, row in enumerate(values["prompt_row"]):
        together.setdefault(row, []).append(i)
    return [
        _entry({name: [column[i] for i in own] for name, column in values.items()})
        for own in together.values()
    ]


# ---- Inside ----------------------------------------------------------------------------------------


def _rows(entry: Entry, prompt: Prompt, columns: Columns) -> Iterator[dict[str, Any]]:
    own = {"prompt_row": entry.row, "prompt_key": entry.key, "prompt_tokens": entry.tokens}
    if not entry.completions:
        yield {**columns.texts(prompt, None), **own, "error": entry.error}
    errors = entry.errors or (None,) * len(entry.completions)
    for i, (c, error) in enumerate(zip(entry.completions, errors, strict=True)):
        parts = {name: rewards[i] for name, rewards in entry.parts.items()}
        yield {
            **columns.texts(prompt, c),
            **own,
            "reward": None if entry.rewards is None else entry.rewards[i],
            "reward_parts": json.dumps(parts) if parts else None,
            "error": error,
            "finish": c.finish,
            "tokens": len(c.token_ids),
            "logp": None if c.logps is None else sum(c.logps),
            "sample": i,
            "token_ids": c.token_ids,
            "logps": c.logps,
            "sampling_logps": c.sampling_logps,
        }


def _entry(values: Mapping[str, Sequence[Any]]) -> Entry:
    """Return the entry of the rows of one prompt, in the order of the samples."""
    key, tokens = str(values["prompt_key"][0]), str(values["prompt_tokens"][0])
    row = int(values["prompt_row"][0])
    if values["sample"][0] is None:
        return Entry(row, key, tokens, error=values["error"][0])
    completions = tuple(
        # Both are often equal, and then one tuple is enough.
        Completion(_text(said), ids, finish, 0, logps, logps if sampling == logps else sampling)
        for said, ids, finish, logps, sampling in zip(
            *(values[name] for name in ("completion", "token_ids", "finish", "logps", "sampling_logps")),
            strict=True,
        )
    )
    parts = [json.loads(text) for text in values["reward_parts"] if text]
    named = {name: tuple(part[name] for part in parts) for name in parts[0]} if parts else {}
    rewards, errors = tuple(values["reward"]), tuple(values["error"])
    return Entry(row, key, tokens, completions, rewards, named, errors)


def _values(column: Any) -> list[Any]:
    """Return a column as Python values; lists become tuples without a detour over each number."""
    if not pa.types.is_list(column.type) or pa.types.is_nested(column.type.value_type):
        return list(column.to_pylist())
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat, ends = array.values.to_numpy(zero_copy_only=False), np.asarray(array.offsets)
    known = array.is_valid().to_pylist()
    return [tuple(flat[ends[i] : ends[i + 1]].tolist()) if there else None for i, there in enumerate(known)]


def _shared(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same token ids, of which all completions share the objects: 8 bytes a token, not 36."""
    return tuple(_IDS.setdefault(i, i) for i in ids)


def _text(said: Any) -> str:
    return said if isinstance(said, str) else str(said[0]["content"])


def _name(column: str) -> str:
    """Return the name of a column of the data in the files; one that the pool writes itself is renamed."""
    taken = column in FIXED or column in OURS or column in ("prompt", "completion")
    return f"data_{column}" if taken else column


def _plain(content: Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [dict(turn) for turn in content]


def _json(value: Any) -> str | None:
    """Return a value as text: a text as it is, another value as JSON."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=repr)
