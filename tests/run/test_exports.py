"""The files of a finished run for other programs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palate.data import write
from palate.journal import Journal
from palate.run import exports
from palate.run.exports import write_exports
from palate.types import Completion, Content, Prompt

TEXT = "Name a fish."
CHAT = ({"role": "user", "content": TEXT},)
OTHER = ({"role": "user", "content": TEXT, "name": "Ann"},)  # a further key
TOOLS = ({"role": "assistant", "content": "", "tool_calls": [{}]},)  # a value that Parquet has no form for


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "BATCH", 3)
    monkeypatch.setattr(exports, "BATCH", 2)


def journal_of(contents: Sequence[Content]) -> Journal:
    journal = Journal(":memory:")
    for i, content in enumerate(contents):
        prompt, completion = Prompt(content), Completion(f"answer {i}", (1, 2), "eos", i)
        journal.keep_completions(f"chunk {i}", i, [prompt], [[completion]])
    return journal


def exported(directory: Path, journal: Journal) -> list[dict[str, Any]]:
    write_exports(directory, {}, (), journal)
    rows: list[dict[str, Any]] = pq.read_table(directory / "completions.parquet").to_pylist()
    return rows


def test_every_completion_is_exported_in_order(tmp_path: Path) -> None:
    journal = journal_of([f"question {i % 5}" for i in range(10)])
    rows = exported(tmp_path, journal)
    assert rows == list(journal.table())
    assert [row["completion"] for row in rows] == [f"answer {i}" for i in range(10)]
    assert list(rows[0]) == [
        *("prompt", "completion", "reward", "finish", "tokens", "policy_version", "place")
    ]
    assert pq.read_metadata(tmp_path / "completions.parquet").num_row_groups == 4


@pytest.mark.parametrize(
    ("contents", "prompts"),
    [
        ([CHAT] * 4, [[{"role": "user", "content": TEXT}]] * 4),
        # In another batch than the first.
        (
            [CHAT, ({"role": "user", "content": "b"},), ({"role": "user", "content": "c"},), OTHER],
            [
                [{"role": "user", "content": TEXT, "name": None}],
                [{"role": "user", "content": "b", "name": None}],
                [{"role": "user", "content": "c", "name": None}],
                [{"role": "user", "content": TEXT, "name": "Ann"}],
            ],
        ),
        (
            ["a", "b", "c", CHAT],
            ["a", "b", "c", '[{"role": "user", "content": "Name a fish."}]'],
        ),
        (
            [CHAT, TOOLS],
            [
                '[{"role": "user", "content": "Name a fish."}]',
                '[{"role": "assistant", "content": "", "tool_calls": [{}]}]',
            ],
        ),
    ],
    ids=["turns", "other keys", "texts and turns", "no form in Parquet"],
)
def test_the_prompts_have_one_type(tmp_path: Path, contents: list[Content], prompts: list[Any]) -> None:
    assert [row["prompt"] for row in exported(tmp_path, journal_of(contents))] == prompts


def test_prompts_of_other_purposes_have_no_influence(tmp_path: Path) -> None:
    journal = journal_of([CHAT])
    judged = Completion("A", (1,), "eos", 0)
    journal.keep_completions("j", 0, [Prompt("Which is better?")], [[judged]], purpose="verdict")
    assert [row["prompt"] for row in exported(tmp_path, journal)] == [[dict(CHAT[0])]]


def test_a_run_without_completions_has_no_file_of_them(tmp_path: Path) -> None:
    write_exports(tmp_path, {"steps": 1}, (), Journal(":memory:"))
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


class Row(dict[str, Any]):
    """A row that can be followed with a weak reference."""

    __hash__ = object.__hash__


def test_only_a_part_of_the_completions_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Row] = weakref.WeakSet()
    most, table = 0, Journal.table

    def followed(journal: Journal) -> Iterator[dict[str, Any]]:
        nonlocal most
        for row in table(journal):
            made = Row(row)
            alive.add(made)
            most = max(most, len(alive))
            yield made

    monkeypatch.setattr(Journal, "table", followed)
    assert len(exported(tmp_path, journal_of(["Q"] * 50))) == 50
    assert most <= 6
