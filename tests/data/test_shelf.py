"""Lists in mapped files, and rows in them."""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path

import numpy as np
import pytest

from palate.data import Account, StoredRows, scan_comparisons
from palate.data.identity import key_of_files
from palate.data.plain import from_json, to_json
from palate.data.shelf import ShelfWriter, opened
from palate.data.stored import store_rows, stored_rows
from palate.given import GivenRows
from palate.types import Comparison, Demonstration, Prompt

TURNS = ({"role": "user", "content": "é 🙂 \u2028"}, {"role": "assistant", "content": "", "tool_calls": [{}]})
ROWS = [
    Comparison(Prompt("q", where="f:1"), "a", "b"),
    Comparison(Prompt(TURNS, {"n": [1, None, 0.5], "s": ""}, "f:2", {"tools": [{}]}), TURNS[1:], "b", 0.25),
    Demonstration(Prompt("", where="f:3"), "text\n", "length"),
]


def equal(one: object, other: object) -> bool:
    """Compare with the parts that records leave out of their own comparison."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_survives_json(row: Comparison | Demonstration) -> None:
    data = to_json(row)
    assert data is not None
    assert equal(from_json(data), row)


@pytest.mark.parametrize(
    "value", [datetime.date(2026, 1, 2), b"x", (1, 2), {1: 2}, float("nan"), {"in": [(1,)]}, np.float32(1)]
)
def test_a_value_that_json_would_change_is_not_expressed(value: object) -> None:
    assert to_json(Comparison(Prompt("q", {"column": value}), "a", "b")) is None


def test_lists_come_back_and_may_be_empty(tmp_path: Path) -> None:
    lists = [[3, 1, 2], [], [7], []]
    with ShelfWriter(tmp_path / "s", {"n": "=i4", "none": "|u1"}) as writer:
        for values in lists:
            writer.add("n", np.array(values, np.int32).tobytes())
        writer.finish({"key": "k"})
    shelf = opened(tmp_path / "s")
    assert shelf is not None
    assert [shelf.get("n", i).tolist() for i in range(shelf.count("n"))] == lists
    assert shelf.count("none") == 0
    assert shelf.facts == {"key": "k"}


def test_a_shelf_that_is_not_finished_is_none(tmp_path: Path) -> None:
    with ShelfWriter(tmp_path / "s", {"n": "=i4"}) as writer:
        writer.add("n", b"1234")
        writer.finish({})
    with ShelfWriter(tmp_path / "s", {"n": "=i4"}) as writer:  # interrupted while it is written again
        writer.add("n", b"1234")
    assert opened(tmp_path / "s") is None


@pytest.mark.parametrize("file", ["s.n", "s.n.ends", "s.json"])
def test_a_shelf_with_a_short_file_is_none(tmp_path: Path, file: str) -> None:
    with ShelfWriter(tmp_path / "s", {"n": "=i4"}) as writer:
        writer.add("n", b"12345678")
        writer.finish({})
    os.truncate(tmp_path / file, (tmp_path / file).stat().st_size - 4)
    assert opened(tmp_path / "s") is None


def test_rows_are_read_again_with_their_account(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    lines = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "who": i} for i in range(200)]
    source.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"prompt": "q", "chosen": "a"}]))
    account, again = Account(), Account()
    rows = scan_comparisons(str(source), account=account)
    written = store_rows(tmp_path / "s", rows, account, "key", lambda count: None)
    read = stored_rows(tmp_path / "s", again, source="key")
    assert isinstance(read, StoredRows)
    assert [r.prompt.columns["who"] for r in read] == list(range(200))
    assert equal(read[1:199:50], written[1:199:50])
    assert equal(read[-1], written[199])
    assert again == account
    assert list(again.lines()) == list(account.lines())
    assert read.key == written.key
    assert stored_rows(tmp_path / "s", Account(), source="other") is None
    with pytest.raises(IndexError):
        read[200]


def test_rows_that_json_cannot_express_stay_in_memory(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    given = [
        {"prompt": f"q{i}", "chosen": "a", "rejected": "b", "day": day if i == 1 else i} for i in range(3)
    ]
    account = Account()
    rows = scan_comparisons(GivenRows(given), account=account)
    written = store_rows(tmp_path / "s", rows, account, None, lambda count: None)
    assert [row.prompt.columns["day"] for row in written] == [0, day, 2]
    assert not written.lasting
    assert stored_rows(tmp_path / "s", Account(), key=written.key) is None


def test_a_key_is_that_of_the_content(tmp_path: Path) -> None:
    source = tmp_path / "d.jsonl"
    source.write_text("abcd")
    key, times = key_of_files(str(source)), source.stat()
    source.write_text("abce")  # of the same size and time
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key_of_files(str(source)) not in (key, None)
    source.write_text("abcd")
    moved = source.rename(tmp_path / "e.jsonl")
    assert key_of_files(str(moved)) == key
    folder = key_of_files(str(tmp_path))
    (tmp_path / "f.jsonl").write_text("")
    assert key_of_files(str(tmp_path)) not in (folder, None)


@pytest.mark.parametrize("source", ["everyday", "owner/name", "missing.jsonl", "owner/name:config"])
def test_other_sources_have_no_key(source: str) -> None:
    assert key_of_files(source) is None
