from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from palate.cli import main
from palate.cli.inspected import show_inspection
from palate.config import DataConfig, ModelConfig
from palate.inspection import look, read
from palate.model import load_codec

PAIRS = [
    {"prompt": "Name a colour", "chosen": "blue", "rejected": "no", "source": "x"},
    {"prompt": "Say hi", "chosen": "hi", "rejected": "hi"},
    {"prompt": "Name a colour", "chosen": "blue", "rejected": "no"},
    {"prompt": "Count", "chosen": "1 2 3"},
]
ANSWERED = [
    {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "dd", "mood": "calm"},
        ]
    }
]
ASKED = [{"prompt": "a", "wanted": "e"}]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    """The objects that `palate inspect ... --json` prints."""
    assert main(["inspect", *map(str, words), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def test_pairs(data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, PAIRS)
    assert lines(capsys, data, "--model", tiny, "--method", "dpo", "--rows", "1") == [
        {
            "where": f"{data}:1",
            "prompt": "<bos>user:Name a colour<end><bos>assistant:",
            "completion": "blue<end>",
            "rejected": "no<end>",
            "prompt_tokens": 31,
            "completion_tokens": 5,
            "learnt": 5,
            "matches_template": True,
            "unused": ["column 'source'"],
        }
    ]


def test_the_last_answer(data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, ANSWERED)
    (line,) = lines(capsys, data, "--model", tiny, "--method", "sft")
    assert line["prompt"] == "<bos>user:a<end><bos>assistant:b<end><bos>user:c<end><bos>assistant:"
    assert (line["completion"], line["completion_tokens"], line["learnt"]) == ("dd<end>", 3, 3)
    assert line["unused"] == ["key 'mood' of a turn"]
    assert line["matches_template"] is True


def test_prompts(data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, ASKED)
    (line,) = lines(capsys, data, "--model", tiny, "--method", "oaif")
    assert line["prompt"] == "<bos>user:a<end><bos>assistant:"
    assert (line["completion"], line["completion_tokens"], line["learnt"]) == ("", 0, 0)
    assert line["unused"] == ["column 'wanted'"]


@pytest.mark.parametrize(("rows", "method"), [(PAIRS, "dpo"), (ANSWERED, "sft"), (ASKED, "oaif")])
def test_without_a_method_the_rows_say_how_they_are_read(
    rows: list[dict[str, Any]], method: str, data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, rows)
    shown = lines(capsys, data, "--model", tiny)
    assert shown == lines(capsys, data, "--model", tiny, "--method", method)


def test_a_way_of_a_method_that_reads_other_rows(
    data: Path, tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, PAIRS)
    prompts = lines(capsys, data, "--model", tiny, "--method", "rso")
    pairs = lines(capsys, data, "--model", tiny, "--method", "rso", "--variant", "direct")
    assert [line["completion"] for line in prompts] == ["", "", "", ""]
    assert [line["completion"] for line in pairs] == ["blue<end>", "blue<end>"]


def test_flags_of_data_and_templates(
    data: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, [{"q": "a", "a": "0123456789"}, {"q": "b", "a": "c"}])
    template = tmp_path / "own.jinja"
    template.write_text("{{ mark }}{% for m in messages %}<bos>{{ m['content'] }}<end>{% endfor %}")
    words = "--method sft --map prompt=q --map completion=a --limit 1 --max-length 10"
    own = ("--chat-template", template, "--chat-template-kwargs", "mark=!")
    (line,) = lines(capsys, data, "--model", tiny, *words.split(), *own)
    assert line["prompt"].startswith("!<bos>a<end>")
    assert line["completion"].endswith("0123456789<end>")
    assert line["learnt"] < line["completion_tokens"]
    assert line["learnt"] + line["prompt_tokens"] == 10


def test_what_is_printed(data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, PAIRS)
    assert main(["inspect", str(data), "--model", tiny, "--rows", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for said in (
        "read as pairs",
        "2 of 4 rows are used",
        "1 x rejected is missing",
        "chosen and rejected are the same",
        "column 'source' (1 row, first",
        "no row is longer than 256 tokens",
        "the same as an earlier row",
        "<end> closes a completion",
        "the chat template's own rendering in every row",
        "prompt 31 31 31 31 31 31",
        "chosen 5 5 5 5 5 5",
        "blue<end>",
    ):
        assert said in out, said


def test_the_parts_have_colours(data: Path, tiny: str) -> None:
    write(data, [{"prompt": "a\x1b[2J", "completion": "0123456789"}])
    codec = load_codec(ModelConfig(model=tiny, max_length=30))
    inspection = look(codec, read(DataConfig(data=str(data))), str(data))
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=200)
    show_inspection(inspection, codec, "rows", 1, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[36m<bos>user:a\N{REPLACEMENT CHARACTER}[2J<end><bos>assistant:" in out
    learnt = inspection.rows[0].shown[0].learnt
    assert f"\x1b[1;32m{learnt}" in out
    assert f"\x1b[9;31m{inspection.rows[0].shown[0].cut}" in out
    assert learnt
    assert "\x1b[2J" not in out


def test_no_weights_are_needed(
    data: Path, tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, PAIRS)
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert lines(capsys, data, "--model", bare) == lines(capsys, data, "--model", tiny)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "data is missing; write `palate inspect DATA`"),
        ("rows.jsonl --method dpoo", "unknown method 'dpoo'; did you mean 'dpo'?"),
        ("rows.jsonl --variant direct", "variant is 'direct' without a method; give --method too"),
        ("rows.jsonl --method dpo --variant direct", "variant is 'direct', dpo has no variants"),
        ("rows.jsonl --method rso --variant x", "variant is 'x', expected one of "),
        ("rows.jsonl --rows -1", "--rows is -1, expected a whole number of at least 0"),
        ("none.jsonl", "none.jsonl does not exist."),
        ("rows.jsonl --method sft", "completion is missing"),
        ("rows.jsonl --strict", "rejected is missing"),
        ("rows.jsonl --model nowhere/at/all", "'nowhere/at/all' does not exist"),
    ],
)
def test_mistakes(
    words: str, message: str, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(data, PAIRS)
    monkeypatch.chdir(data.parent)
    assert main(["inspect", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_prompts_that_leave_no_room(data: Path, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(data, ASKED)
    words = ["inspect", str(data), "--model", tiny, "--method", "oaif"]
    assert main(words) == 0
    assert "leave no room for 256 new tokens" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--max-new-tokens", "256"]) == 2
    assert "leaves no room for 256 new tokens, since " in capsys.readouterr().err
