from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palate.data import read_demonstrations
from palate.errors import RunError
from palate.pool import Columns, Entry, prompt_key, read_shard, rows, write_shard
from palate.types import Completion, Prompt

CHAT = ({"role": "user", "content": "hi"},)


def entry(row: int, prompt: Prompt, *texts: str, **facts: Any) -> Entry:
    completions = tuple(
        Completion(
            text, (*range(len(text)), 99), "eos", 0, (-0.5,) * (len(text) + 1), (-0.25,) * (len(text) + 1)
        )
        for text in texts
    )
    return Entry(row, prompt_key(prompt), f"tokens {row}", completions, **facts)


def written(path: Path, prompts: list[Prompt], entries: list[Entry]) -> list[dict[str, Any]]:
    write_shard(path, entries, prompts, Columns(prompts))
    return list(pq.read_table(path).to_pylist())


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    prompts = [Prompt("a", {"answer": 1}), Prompt("b", {"answer": 2})]
    entries = [
        entry(0, prompts[0], "x", "", rewards=(0.1, None), parts={"p": (1.0, None), "q": (2.0, 3.0)},
              errors=(None, "the function raised")),
        entry(1, prompts[1], error="the prompt is too long"),
    ]  # fmt: skip
    rows = written(tmp_path / "0.parquet", prompts, entries)
    assert read_shard(tmp_path / "0.parquet") == entries
    assert [row["prompt"] for row in rows] == ["a", "a", "b"]
    assert [row["completion"] for row in rows] == ["x", "", None]
    assert [row["answer"] for row in rows] == [1, 1, 2]
    assert [row["error"] for row in rows] == [None, "the function raised", "the prompt is too long"]
    assert [row["reward"] for row in rows] == [0.1, None, None]
    # Equality of completions leaves the log-probabilities out.
    assert [c.logps for c in read_shard(tmp_path / "0.parquet")[0].completions] == [(-0.5, -0.5), (-0.5,)]


def test_only_some_prompts_and_completions_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt("a"), Prompt("b")]
    write_shard(
        tmp_path / "0.parquet",
        [entry(i, p, "x", "y", "z") for i, p in enumerate(prompts)],
        prompts,
        Columns(prompts),
    )
    converted, values = [], rows._values
    monkeypatch.setattr(rows, "_values", lambda column: converted.append(len(column)) or values(column))
    (read,) = read_shard(tmp_path / "0.parquet", keys=frozenset({prompt_key(prompts[1])}), n=2)
    assert (read.row, [c.text for c in read.completions]) == (1, ["x", "y"])
    assert set(converted) == {2}  # the others never become Python values
    assert read_shard(tmp_path / "0.parquet", keys=frozenset({"another"})) == []


def test_completions_share_what_is_equal(tmp_path: Path) -> None:
    # A run holds all completions of its pool.
    ids = (1000, 2000, 3000)
    drawn = Completion("x", ids, "eos", 0, (-0.5, -1.5, -2.5), (-0.5, -1.5, -2.5))
    warm = Completion("y", ids, "eos", 0, (-0.5, -1.5, -2.5), (-0.25, -1.5, -2.5))
    prompt = Prompt("a")
    made = Entry(0, prompt_key(prompt), "tokens", (drawn, warm))
    write_shard(tmp_path / "0.parquet", [made], [prompt], Columns([prompt]))
    first, second = read_shard(tmp_path / "0.parquet")[0].completions
    assert (first.logps, second.logps, second.sampling_logps) == (
        drawn.logps,
        warm.logps,
        warm.sampling_logps,
    )
    assert first.sampling_logps is first.logps
    assert all(one is other for one, other in zip(first.token_ids, second.token_ids, strict=True))


def test_all_files_of_a_pool_have_the_same_columns(tmp_path: Path) -> None:
    # A file in which a column is empty would give it another type, and readers of the folder would fail.
    prompts = [
        Prompt("a", {"answer": None}),
        Prompt("b", {"answer": "no", "reward": 5, "odd": {}}),
        Prompt(CHAT),
    ]
    columns = Columns(prompts)
    for i, prompt in enumerate(prompts):
        write_shard(tmp_path / f"{i}.parquet", [entry(i, prompt, "x")], prompts, columns)
    table = pq.read_table(tmp_path)
    assert table["prompt"].to_pylist() == ["a", "b", '[{"role": "user", "content": "hi"}]']
    assert table["answer"].to_pylist() == [None, "no", None]
    assert table["data_reward"].to_pylist() == [None, 5, None]
    assert table["odd"].to_pylist() == [None, "{}", None]


def test_conversations_are_written_as_turns(tmp_path: Path) -> None:
    prompts = [Prompt(CHAT, variables={"tools": [{"name": "f"}]})]
    (row,) = written(tmp_path / "0.parquet", prompts, [entry(0, prompts[0], "yes")])
    assert row["prompt"] == [dict(turn) for turn in CHAT]
    assert row["completion"] == [{"role": "assistant", "content": "yes"}]
    assert row["tools"] == '[{"name": "f"}]'
    assert read_shard(tmp_path / "0.parquet")[0].completions[0].text == "yes"


def test_other_commands_read_the_folder(tmp_path: Path) -> None:
    prompts = [Prompt("a"), Prompt("b")]
    entries = [entry(0, prompts[0], "x", "y", rewards=(1.0, 2.0)), entry(1, prompts[1], "z", rewards=(0.0,))]
    write_shard(tmp_path / "shards" / "0.parquet", entries, prompts, Columns(prompts))
    rows = read_demonstrations(str(tmp_path / "shards"))
    assert [(row.prompt.text, row.completion) for row in rows] == [("a", "x"), ("a", "y"), ("b", "z")]


def test_a_second_write_replaces_the_first_and_leaves_nothing_else(tmp_path: Path) -> None:
    prompts = [Prompt("a")]
    for text in ("first", "second"):
        write_shard(tmp_path / "0.parquet", [entry(0, prompts[0], text)], prompts, Columns(prompts))
    assert read_shard(tmp_path / "0.parquet")[0].completions[0].text == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["0.parquet"]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(RunError, match=r"0\.parquet' cannot be read: .*restore a good copy"):
        read_shard(tmp_path / "0.parquet")
