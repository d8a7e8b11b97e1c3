import os
import weakref
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pytest

from palate.data import read_comparisons, read_demonstrations, read_rows, write, write_rows
from palate.errors import DataError

TURNS = ({"role": "user", "content": "Wie geht's?\n☕"},)
ROWS = [
    {"prompt": TURNS, "chosen": "Gut!", "rejected": "So là là.", "margin": 0.1},
    MappingProxyType({"prompt": (MappingProxyType(TURNS[0]),), "chosen": " ", "rejected": "", "margin": 2.0}),
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_what_was_written_is_read(tmp_path, name):
    path = tmp_path / name
    write_rows(path, iter(ROWS))
    assert [row.columns for row in read_rows(str(path))] == [
        {"prompt": list(TURNS), "chosen": "Gut!", "rejected": "So là là.", "margin": 0.1},
        {"prompt": list(TURNS), "chosen": " ", "rejected": "", "margin": 2.0},
    ]
    comparisons, same = read_comparisons(str(path), limit=1)
    assert (comparisons[0].prompt.content, comparisons[0].margin, same) == (TURNS, 0.1, 0)
    assert os.listdir(tmp_path) == [name]


def test_parquet_has_the_columns_of_all_rows(tmp_path):
    write_rows(tmp_path / "p.parquet", [{"a": 1}, {"a": 2, "b": "x"}])
    rows = read_rows(str(tmp_path / "p.parquet"))
    assert [row.columns for row in rows] == [{"a": 1, "b": None}, {"a": 2, "b": "x"}]


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("p.csv", [{"a": 1}], "p.csv has the suffix '.csv'; rows are written to .jsonl or .parquet."),
        ("p", [{"a": 1}], "p has the suffix ''; rows are written to .jsonl or .parquet."),
        ("p.jsonl", [], "p.jsonl is not written: there are no rows; expected at least one."),
        ("no/p.jsonl", [{"a": 1}], "/no does not exist; create it first"),
        ("dir.jsonl", [{"a": 1}], "dir.jsonl cannot be written: it is a folder; name a file."),
        (
            "p.jsonl",
            [{"a": 1}, {"a": {1}}],
            "p.jsonl is not written: row 2 cannot be written as JSON (Object of type set",
        ),
        (
            "p.jsonl",
            [{"a": float("nan")}],
            "p.jsonl is not written: row 1 cannot be written as JSON (Out of range float",
        ),
        (
            "p.jsonl",
            [{"a": "\ud83d"}],
            "p.jsonl is not written: row 1 cannot be written as JSON ('utf-8' codec",
        ),
        ("p.parquet", [{"a": 1}, {"a": "x"}], "p.parquet is not written: column 'a' is not of one type ("),
        ("p.parquet", [{"a": {}}], "p.parquet is not written as Parquet ("),
        ("p.parquet", [{"a": "\ud83d"}], "p.parquet is not written: column 'a' is not of one type ("),
    ],
)
def test_what_cannot_be_written(tmp_path, name, rows, message):
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError) as caught:
        write_rows(tmp_path / name, rows)
    assert message in str(caught.value)
    assert os.listdir(tmp_path) == ["dir.jsonl"]


class Text(str):
    """A text that can be followed with a weak reference."""


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_rows_with_given_types_are_written_in_batches(tmp_path, monkeypatch, name):
    monkeypatch.setattr(write, "BATCH", 10)
    alive: weakref.WeakSet[Text] = weakref.WeakSet()
    most = 0

    def rows():
        nonlocal most
        for i in range(95):
            text = Text(f"text {i}")
            alive.add(text)
            most = max(most, len(alive))
            yield {"text": text, "turns": [{"role": "user"}] if i < 50 else [{"n": i}], "number": None}

    turn = pa.list_(pa.struct({"role": pa.string(), "n": pa.int64()}))
    write_rows(tmp_path / name, rows(), {"text": pa.string(), "turns": turn, "number": pa.float64()})
    read = [row.columns for row in read_rows(str(tmp_path / name))]
    assert [row["text"] for row in read] == [f"text {i}" for i in range(95)]
    assert [row["turns"][0].get("n") for row in read] == [None] * 50 + list(range(50, 95))
    assert most <= 30


def test_a_value_of_another_type_is_named(tmp_path):
    with pytest.raises(DataError, match=r"p\.parquet is not written: column 'a' is not of one type \("):
        write_rows(tmp_path / "p.parquet", [{"a": 1}, {"a": "x"}], {"a": pa.int64()})
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "p.jsonl"
    write_rows(path, [{"a": 1}])
    with pytest.raises(DataError):
        write_rows(path, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n'
    write_rows(str(path), [{"a": 3}])
    assert path.read_text() == '{"a": 3}\n'


def test_an_unwritable_place(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"p\.jsonl cannot be written: No space left on device\.$"):
        write_rows(tmp_path / "p.jsonl", [{"a": 1}])
    assert os.listdir(tmp_path) == []


def test_a_read_only_disk(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)  # even for a file that is not there
    with pytest.raises(DataError, match=r"p\.jsonl cannot be written: Read-only file system\.$"):
        write_rows(tmp_path / "p.jsonl", [{"a": 1}])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_finish_travels_with_the_texts(tmp_path, name):
    path = tmp_path / name
    write_rows(path, [{"prompt": "a", "completion": "b", "finish": f} for f in ("eos", "length", "stop")])
    rows = read_demonstrations(str(path))
    assert [row.finish for row in rows] == ["eos", "length", "eos"]
    assert [dict(row.prompt.columns) for row in rows] == [{}, {}, {}]
    write_rows(path, [{"prompt": "a", "chosen": "b", "rejected": "c", "rejected_finish": "length"}])
    ((pair,), _) = read_comparisons(str(path))
    assert (pair.chosen_finish, pair.rejected_finish) == ("eos", "length")
