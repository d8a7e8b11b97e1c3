"""`palate make prompts` and `palate make eft`, with a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from palate.cli import main
from palate.testing import tiny_model
from palate.types import Completion


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with room for a list of prompts, or for the question of a judge."""
    return tiny_model(tmp_path_factory.mktemp("chatty"), chat=True, max_position_embeddings=4096)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, *content: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return str(path)


RANKED: list[dict[str, Any]] = [
    {"prompt": f"question {i}", "completions": [f"a{i}", f"b{i}", f"c{i}"], "scores": [i, 2 * i, 3 * i + 1]}
    for i in range(40)
]


ALONE: dict[str, Any] = {"completion": "a", "score": 1}


def test_prompts_resume_and_grow(
    chatty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = write(tmp_path / "seeds.jsonl", *({"prompt": f"What is number {i}?"} for i in range(8)))
    output = tmp_path / "new.jsonl"
    command = ["make", "prompts", "--data", seeds, "--model", chatty, "--output", str(output), "--count", "4"]
    command += ["--max-new-tokens", "24", "--dtype", "float32", "--device", "cpu", "--min-words", "1"]
    command += ["--temperature", "1", "--top-p", "1"]
    assert main(command) == 0
    first = rows(output)
    assert len(first) == 4
    said = capsys.readouterr().out
    assert "4 new prompts from" in said
    assert "begins with a mark" in said

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a reply was sampled again")

    with monkeypatch.context() as patch:
        patch.setattr("palate.model.rollouts._sampled", never)
        assert main(command) == 0
    assert rows(output) == first
    assert main([part if part != "4" else "6" for part in command]) == 0
    assert rows(output)[:4] == first


def test_gold_examples_and_the_held_out_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = write(tmp_path / "ranked.jsonl", *RANKED), tmp_path / "eft.jsonl"
    assert main(["make", "eft", "--data", data, "--output", str(output), "--held-out", "0.3"]) == 0
    made, unseen = rows(output), rows(tmp_path / "eft-held-out.jsonl")
    assert {row["score"] for row in made} == set(range(6))
    assert all(row["completion"].endswith(f"\nScore: {row['score']}") for row in made)
    assert 3 * (len(RANKED) - len(unseen)) == len(made)
    assert all(row in RANKED for row in unseen)
    shown = "".join(row["prompt"] for row in made)
    assert not any(f"{row['prompt']}\n" in shown for row in unseen)
    said = capsys.readouterr().out
    assert f"{len(made)} examples from {40 - len(unseen)} prompts" in said


MOODS = ("Awful.", "Sad.", "Flat.", "Pleasant.", "Happy.", "Joyful.")


def test_own_justifications(tmp_path: Path) -> None:
    data, output, own = write(tmp_path / "ranked.jsonl", *RANKED), tmp_path / "eft.jsonl", tmp_path / "moods"
    own.write_text("\n".join(MOODS) + "\n\n")
    command = ["make", "eft", "--data", data, "--output", str(output), "--justifications", str(own)]
    assert main(command) == 0
    assert {row["completion"] for row in rows(output)} == {f"{m}\nScore: {i}" for i, m in enumerate(MOODS)}


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (MOODS[1:], [], "has 5 lines with text; justifications need 6 different lines, for 0 to 5 points"),
        (("Sad.", *MOODS[1:]), [], "has the line 'Sad.' twice"),
        (("Score: 3", *MOODS[1:]), [], "'Score: 3' contains a score, so that a judge could not read"),
        (None, [], "cannot read "),
        (MOODS, ["--judge-mode", "score"], "leave --justifications out"),
        (MOODS, ["--eft-writer", "local:some"], "leave --justifications out"),
    ],
)
def test_justifications_that_cannot_be_used(
    lines: Sequence[str] | None,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, output, own = write(tmp_path / "ranked.jsonl", *RANKED), tmp_path / "eft.jsonl", tmp_path / "moods"
    if lines is not None:
        own.write_text("\n".join(lines))
    command = ["make", "eft", "--data", data, "--output", str(output), "--justifications", str(own)]
    assert main([*command, *options]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_the_questions_are_those_of_the_judge(tmp_path: Path) -> None:
    data, output = write(tmp_path / "ranked.jsonl", *RANKED), tmp_path / "eft.jsonl"
    template = tmp_path / "own.jinja"
    template.write_text("{{ criteria }}|{{ prompt }}|{{ completion }}|{{ labels[-1] }}")
    command = ["make", "eft", "--data", data, "--output", str(output), "--held-out", "0", "--no-chat"]
    assert (
        main([*command, "--judge-mode", "score", "--judge-template", str(template), "--criteria", "Be kind"])
        == 0
    )
    made = rows(output)
    assert {row["completion"] for row in made} == set(map(str, range(1, 11)))
    assert all(row["prompt"].startswith("Be kind|question ") for row in made)
    assert all(row["prompt"].endswith("|10\n\nAnswer:\n") for row in made)
    assert not (tmp_path / "eft-held-out.jsonl").exists()


def test_a_local_writer_scores_in_bare_numbers(
    chatty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from palate.annotate.judges.local import LocalModel

    def numbers(self: Any, questions: Any, prompts: Any) -> list[Completion]:
        places = [RANKED[0]["completions"].index(question.texts[0]) for question in questions]
        return [Completion(str(3 * place + 1), (1,)) for place in places]

    monkeypatch.setattr(LocalModel, "_write", numbers)
    template = tmp_path / "t.jinja"
    template.write_text("{{ prompt }}|{{ completion }}|{{ labels[-1] }}")
    row = {**RANKED[0], "scores": [1, 2, 3]}
    data, output = write(tmp_path / "ranked.jsonl", row), tmp_path / "eft.jsonl"
    command = ["make", "eft", "--data", data, "--output", str(output), "--held-out", "0", "--device", "cpu"]
    command += ["--judge-mode", "score", "--judge-template", str(template)]
    assert main([*command, "--eft-writer", f"local:{chatty}"]) == 0
    assert {row["completion"]: row["score"] for row in rows(output)} == {"1": 1, "4": 4, "7": 7}


def test_a_writer_that_cannot_grade(
    chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output = write(tmp_path / "ranked.jsonl", *RANKED[:4]), tmp_path / "eft.jsonl"
    command = ["make", "eft", "--data", data, "--output", str(output), "--held-out", "0", "--device", "cpu"]
    command += ["--eft-writer", f"local:{chatty}", "--attempts", "1", "--judge-reasoning", "8"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "no example is left of 4 prompts (4: a grading has no clear score)" in error
    assert "--eft-writer gold" in error
    assert not output.exists()

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("a grading was sampled again")

    monkeypatch.setattr("palate.model.rollouts._sampled", never)
    assert main(command) == 2  # the verdicts are in the journal


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--output", "eft.csv"], "rows are written to .jsonl or .parquet"),
        (["--judge-mode", "pairwise"], "--judge-mode"),
        (["--eft-writer", "nobody"], "eft_writer is 'nobody'; expected gold"),
        (["--eft-writer", "nobody:x"], "eft_writer is 'nobody:x'; expected gold"),
        (["--data", "missing.jsonl"], "missing.jsonl does not exist"),
        (["--held-out", "0.999999"], "are held out; give more prompts, or --held-out 0"),
        (["--eft-writer", "Gold"], "eft_writer is 'Gold'; expected gold, local:MODEL or server:MODEL@URL"),
        (["--eft-writer", "self"], "eft_writer is 'self'; expected gold, local:MODEL"),
        (["--judge-panel", "local:x"], "unknown flag --judge-panel"),
        (["--attempts", "2"], "attempts is set, but eft_writer is gold, which asks no model"),
        (["--max-verdicts", "2"], "max_verdicts is set, but eft_writer is gold"),
        (["--judge-temperature", "0.5"], "judge_temperature is set, but eft_writer is gold"),
    ],
)
def test_mistakes(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "ranked.jsonl", *RANKED[:4])
    values = {"--data": data, "--output": str(tmp_path / "eft.jsonl"), "--held-out": "0"}
    values |= dict([change])  # type: ignore[list-item]
    assert main(["make", "eft", *(part for pair in values.items() for part in pair)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["eft", "prompts"])
def test_the_data_are_not_overwritten(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = Path(write(tmp_path / "prompts.jsonl", *RANKED[:4])).read_bytes()
    command = ["make", kind, "--data", "prompts.jsonl", "--output", str(tmp_path / "prompts.jsonl")]
    assert main(command) == 2
    assert "it is the data to read, which would be lost" in capsys.readouterr().err
    assert (tmp_path / "prompts.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("eft", ["--data", "r2-held-out.jsonl", "--output", "r2.jsonl"]),
        ("eft", ["--data", "r.jsonl", "--output", "r2.jsonl", "--justifications", "r2-held-out.jsonl"]),
        ("eft", ["--data", "r.jsonl", "--output", "r2-held-out.jsonl", "--judge-template", "link.jsonl"]),
        ("prompts", ["--data", "r.jsonl", "--output", "r2-held-out.jsonl", "--exclude", "link.jsonl"]),
    ],
)
def test_no_file_that_is_read_is_overwritten(
    kind: str,
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", *RANKED[:4])
    before = Path(write(tmp_path / "r2-held-out.jsonl", *RANKED)).read_bytes()
    (tmp_path / "link.jsonl").symlink_to("r2-held-out.jsonl")
    assert main(["make", kind, *options]) == 2
    assert "r2-held-out.jsonl is not written: it is the data to read" in capsys.readouterr().err
    assert (tmp_path / "r2-held-out.jsonl").read_bytes() == before
    assert not (tmp_path / "r2.jsonl").exists()


def test_an_earlier_held_out_part_does_not_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = write(tmp_path / "ranked.jsonl", *RANKED), tmp_path / "eft.jsonl"
    command = ["make", "eft", "--data", data, "--output", str(output)]
    assert main(command) == 0
    assert (tmp_path / "eft-held-out.jsonl").exists()
    capsys.readouterr()
    assert main([*command, "--held-out", "0"]) == 0
    assert f"removed {tmp_path / 'eft-held-out.jsonl'}" in capsys.readouterr().out
    assert not (tmp_path / "eft-held-out.jsonl").exists()
    assert main([*command, "--held-out", "0.0001"]) == 0
    assert "no prompt is held out: 0.0001 of 40 prompts" in capsys.readouterr().out


def test_a_bare_number_has_no_reasoning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "ranked.jsonl", *RANKED)
    command = ["make", "eft", "--data", data, "--output", str(tmp_path / "eft.jsonl")]
    assert main([*command, "--judge-mode", "score", "--judge-reasoning", "30"]) == 2
    assert "judge_reasoning is 30, but the examples of --judge-mode score" in capsys.readouterr().err


def test_prompts_with_more_ranks_than_scores_are_not_paid_for(
    chatty: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = {"prompt": "many", "completions": [str(i) for i in range(7)], "ranks": list(range(7))}
    data, output = write(tmp_path / "ranked.jsonl", many), tmp_path / "eft.jsonl"
    command = ["make", "eft", "--data", data, "--output", str(output), "--held-out", "0", "--device", "cpu"]
    assert main([*command, "--eft-writer", f"local:{chatty}"]) == 2
    said = capsys.readouterr()
    assert "left out 1 of 1 prompts: they have more different ranks than the judge has scores (6)" in said.out
    assert "no prompt has at most 6 different ranks" in said.err


def test_unusable_ranked_data_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*RANKED, {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "alone", **ALONE}]
    data = write(tmp_path / "ranked.jsonl", *rows)
    assert main(["make", "eft", "--data", data, "--output", str(tmp_path / "eft.jsonl")]) == 0
    said = capsys.readouterr().out
    assert f"left out 1 row, first {data}:41: chosen and rejected are the same" in said
    assert f"left out 1 row, first {data}:42: a prompt has only one answer" in said


def test_prompts_that_cannot_be_kept_in_number(
    chatty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = write(tmp_path / "seeds.jsonl", {"question": "What is number 7?"})
    other = write(
        tmp_path / "other.jsonl", {"prompt": "grade", "completion": "no", "about": "Why do cats purr"}
    )
    output = tmp_path / "new.jsonl"
    command = ["make", "prompts", "--data", seeds, "--map", "prompt=question", "--model", chatty]
    command += ["--output", str(output), "--exclude", other, "--device", "cpu", "--max-new-tokens", "4"]
    assert main([*command, "--min-words", "9", "--max-words", "3"]) == 2
    assert "min_words is 9 and max_words is 3, so no prompt would be kept" in capsys.readouterr().err
    always = ["Why do cats purr", "Where do all the birds sleep"]
    monkeypatch.setattr("palate.making.prompts.listed", lambda *args, **options: always)
    assert main([*command, "--count", "3"]) == 2
    assert f"{output} has the prompts kept so far (1)" in capsys.readouterr().err
    assert rows(output) == [{"prompt": "Where do all the birds sleep"}]


def test_a_row_without_answers_names_its_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "ranked.jsonl", {"prompt": "q", "answer_text": "a"})
    assert main(["make", "eft", "--data", data, "--output", str(tmp_path / "eft.jsonl")]) == 2
    assert "Columns beside the prompt: answer_text" in capsys.readouterr().err


def test_an_unknown_kind_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make", "foo"]) == 2
    assert capsys.readouterr().err == (
        "palate: unknown kind of data 'foo'; `palate make --help` lists the kinds of data\n"
    )
