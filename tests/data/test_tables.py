"""Tables and lines as programs other than Palate write them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from palate.data import Account, read_comparisons, read_demonstrations, read_rows
from palate.errors import DataError

ROW = {"prompt": "Hi, you", "chosen": "Hello", "rejected": "No; never"}


@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("csv", 'prompt,chosen,rejected{end}"Hi, you",Hello,No; never{end}'),
        ("csv", 'prompt;chosen;rejected{end}Hi, you;Hello;"No; never"{end}'),
        ("csv", "prompt\tchosen\trejected{end}Hi, you\tHello\tNo; never{end}"),
        ("tsv", "prompt\tchosen\trejected{end}Hi, you\tHello\tNo; never{end}"),
    ],
)
def test_the_sign_between_the_names(tmp_path: Path, suffix: str, text: str, end: str, bom: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((bom + text.format(end=end)).encode())
    assert [row.columns for row in read_rows(str(path))] == [ROW]
    packed = tmp_path / f"a.{suffix}.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert [row.columns for row in read_rows(str(packed))] == [ROW]


def test_a_semicolon_in_a_name_is_part_of_it_where_commas_separate(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,a;b\nHi,1\n")
    assert [row.columns for row in read_rows(str(path))] == [{"prompt": "Hi", "a;b": "1"}]


@pytest.mark.parametrize("kind", ["utf-16", "utf-16-be"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv.gz"])
def test_utf_16_is_named(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"a.{suffix}"
    content = ("\ufeff" * (kind == "utf-16-be") + json.dumps(ROW)).encode(kind)
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=r"is in UTF-16; save it as UTF-8\.$"):
        list(read_rows(str(path)))


@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_in_a_file_named_jsonl(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([ROW, ROW], indent=indent))
    assert [row.columns for row in read_rows(str(path))] == [ROW, ROW]
    rows, _ = read_comparisons(str(path))
    assert len(rows) == 2


def test_lines_with_arrays_stay_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[1, 2]\n" + json.dumps(ROW) + "\n")
    account = Account()
    assert len(read_comparisons(str(path), account=account)[0]) == 1
    assert account.bad == 1


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "0", "False"])
def test_a_label_of_zero_marks_a_bad_answer(tmp_path: Path, label: object) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q", "completion": text, "label": mark} for text, mark in (("A", True), ("B", label))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    account = Account()
    assert [row.completion for row in read_demonstrations(str(path), account=account)] == ["A"]
    assert account.dropped_rows == 1


def test_a_class_of_a_text_is_no_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "A film.", "label": label}) + "\n" for label in (0, 1, 2)))
    assert len(read_demonstrations(str(path))) == 3


def test_dolly(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"instruction": "Who?", "context": "In a boat.", "response": "Me.", "category": "qa"},
        {"instruction": "Why?", "context": "", "response": "So.", "category": "qa"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_demonstrations(str(path))
    assert [(row.prompt.text, row.completion) for row in read] == [
        ("Who?\nIn a boat.", "Me."),
        ("Why?", "So."),
    ]


@pytest.mark.parametrize("suffix", ["csv.gz", "tsv.gz", "jsonl.gz"])
def test_a_packed_file_that_is_cut(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(b"prompt;chosen;rejected\n" * 50)[:24])
    with pytest.raises(DataError, match=r"cannot be read as a table|is not a complete gzip file"):
        list(read_rows(str(path)))
    path.write_bytes(b"")
    with pytest.raises(DataError):
        list(read_rows(str(path)))
