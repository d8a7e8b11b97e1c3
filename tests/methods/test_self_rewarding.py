from __future__ import annotations

import json
import math
import signal
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import palate
from palate import loops
from palate.annotate.judges.reading import Reading
from palate.errors import DataError, RunError
from palate.making.prompts import Written
from palate.methods.self_rewarding import SelfRewardingConfig
from palate.testing import tiny_model
from palate.types import Completion, Example, Group, Pair, Prompt

Taught = Callable[..., Any]

ANY = {"temperature": 1.0, "top_p": 1.0, "judge": "self"}


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[Any]]]:
    """The name of each fit and the records that it learns from."""
    seen: list[tuple[str, Sequence[Any]]] = []

    def spy(policy: Any, records: Sequence[Any], *args: Any, **options: Any) -> None:
        seen.append((options["name"], records))
        fit(policy, records, *args, **options)

    fit = loops.fit
    monkeypatch.setattr(loops, "fit", spy)
    monkeypatch.setattr("palate.loops.teaching.fit", spy)
    return seen


def test_the_reward_rises(taught: Taught) -> None:
    # The standard error of the rise is below 0.01: 2,048 completions of 8 tokens before and after.
    prompts = [Prompt(f"q{i}") for i in range(64)]
    found = taught("self-rewarding", None, prompts, lr=2e-2, steps=8, **ANY)
    assert found.rise > 0.08


def test_the_reference_is_the_policy_at_the_start_of_the_round(taught: Taught) -> None:
    rows = taught("self-rewarding", rounds=3, lr=1e-2, **ANY).rows
    assert [row["round"] for row in rows] == [1] * 3 + [2] * 3 + [3] * 3
    for row in rows[::3]:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["rewards/margins"] == row["objective/kl"] == 0.0


def test_lessons_come_first_with_their_own_schedule(
    taught: Taught, fits: list[tuple[str, Sequence[Any]]], tmp_path: Path
) -> None:
    ift = write(tmp_path / "ift.jsonl", *({"prompt": f"say {i}", "completion": f"yes {i}"} for i in range(5)))
    grade = {"completion": "Good.\nScore: 4", "score": 4, "about": "say"}
    eft = write(tmp_path / "eft.jsonl", *({"prompt": f"grade {i}", **grade} for i in range(7)))
    given = {"ift": ift, "eft": eft, "sft_epochs": 2, "sft_lr": 0.02, "batch_size": 4, "schedule": "linear"}
    found = taught("self-rewarding", rounds=1, **given, **ANY)
    name, lessons = fits[0]
    assert name == "lessons"
    assert all(isinstance(lesson, Example) for lesson in lessons)
    assert len(lessons) == 12
    assert [row["round"] for row in found.rows] == [0] * 6 + [1] * 3
    assert found.rows[0]["learning_rate"] == 0.02
    assert found.rows[5]["learning_rate"] == pytest.approx(0.02 / 6)
    assert found.rows[6]["learning_rate"] == 3e-3
    versions = {c.policy_version for pair in fits[1][1] for c in pair.completions}
    assert versions == {6}  # M_1 answers


def test_the_judge_is_measured_before_and_after_each_stage(taught: Taught, tmp_path: Path) -> None:
    eft = write(tmp_path / "eft.jsonl", *({"prompt": f"grade {i}", "completion": "no"} for i in range(4)))
    ranked = write(
        tmp_path / "ranked.jsonl",
        *({"prompt": f"r{i}", "completions": ["aaa", "a..", "..."], "scores": [3, 2, 1]} for i in range(6)),
    )
    found = taught("self-rewarding", eft=eft, judge_data=ranked, judge_gap=1.5, **ANY)
    rows = [row for row in found.rows if "eval_judge/pairwise" in row]
    assert [row["step"] for row in rows] == [0, 1, 4, 7]  # M_0, M_1, M_2, M_3
    for row in rows:
        assert row["eval_judge/unclear"] == row["eval_judge/ties"] == 0
        assert row["eval_judge/pairwise"] == row["eval_judge/exact"] == row["eval_judge/kendall"] == 1.0
        assert row["eval_judge/mean"] == pytest.approx((1 + 1 / 3 + 0) / 3)


def ranked_data(tmp_path: Path, count: int) -> str:
    rows = [{"prompt": f"r{i}", "completions": ["aaa", "a.."], "scores": [3, 2]} for i in range(count)]
    return write(tmp_path / "ranked.jsonl", *rows)


def test_the_judge_is_not_measured_on_what_is_learnt(
    taught: Taught, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("palate.run.display.Display.say", lambda self, text: said.append(text))
    grade = {"prompt": "grade", "completion": "no", "score": 4, "about": " R2"}
    lessons = {
        "eft": write(tmp_path / "eft.jsonl", grade),
        "ift": write(tmp_path / "ift.jsonl", {"prompt": "r4", "completion": "no"}),
    }
    found = taught("self-rewarding", judge_data=ranked_data(tmp_path, 6), rounds=1, **lessons, **ANY)
    (row, *_) = [row for row in found.rows if "eval_judge/pairs" in row]
    assert row["eval_judge/pairs"] == 4
    (told,) = [text for text in said if "lessons" in text]
    assert "2 of the 6 prompts" in told
    assert "ranked.jsonl:3) as" in told
    assert told.endswith("eft.jsonl:1; the judge is not measured on them")
    grade["about"] = "r0"
    lessons["eft"] = write(tmp_path / "eft.jsonl", grade)
    with pytest.raises(DataError, match=r"1 of the 1 prompts .* ranked answers that nothing is learnt from"):
        taught("self-rewarding", judge_data=ranked_data(tmp_path, 1), rounds=1, **lessons, **ANY)


def test_a_gap_without_pairs_is_refused(taught: Taught, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"differ by at most 1, so judge_gap 1\.5 leaves no pair"):
        taught("self-rewarding", judge_data=ranked_data(tmp_path, 3), judge_gap=1.5, **ANY)


def test_positives_alone(taught: Taught, fits: list[tuple[str, Sequence[Any]]]) -> None:
    taught("self-rewarding", rounds=1, learn="positives", **ANY)
    assert len(fits[0][1]) == 16
    assert all(isinstance(record, Example) for record in fits[0][1])
    taught("self-rewarding", rounds=1, learn="positives", positive_score=0.6, **ANY)
    assert 0 < len(fits[1][1]) < 16
    with pytest.raises(RunError, match=r"round 1: no completion of 16 prompts has a score of at least 2"):
        taught("self-rewarding", rounds=1, learn="positives", positive_score=2.0, **ANY)


def test_the_shortest_of_the_best(taught: Taught, fits: list[tuple[str, Sequence[Pair]]]) -> None:
    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [g.annotated(tuple(float(i < len(g.completions) // 2) for i in range(8))) for g in groups]

    options = {"rounds": 1, "n": 8, **ANY}
    taught("self-rewarding", annotate, length_tier=0.0, **options)
    taught("self-rewarding", annotate, **options)
    tiered, plain = (sum(len(pair.chosen.token_ids) for pair in pairs) for _, pairs in fits)
    assert tiered <= plain


def test_new_prompts_are_unlike_all_others(
    taught: Taught, fits: list[tuple[str, Sequence[Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eft = write(
        tmp_path / "eft.jsonl", {"prompt": "grade", "completion": "no", "about": "why is grass green"}
    )
    calls: list[int] = []

    def scripted(writer: Any, seeds: Any, count: int, sieve: Any, sampling: Any, *, seed: int) -> Written:
        assert writer.version == 1  # M_1, in every round
        assert seeds == [f"q{i}" for i in range(16)]
        assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.6, 0.9, 99)
        assert not sieve.takes("Why is grass green")
        made = [[f"{word}{len(calls)}{i}" for word in ("who", "sells", "blue", "tea")] for i in range(count)]
        texts = [" ".join(words) for words in made]
        calls.append(seed)
        assert all(sieve.takes(text) for text in texts[:1])
        assert not sieve.takes(texts[0])
        return Written(tuple(map(Prompt, texts)), 1)

    monkeypatch.setattr("palate.loops.teaching.write_prompts", scripted)
    taught("self-rewarding", eft=eft, new_prompts="sft", new_prompt_tokens=99, prompts_per_round=5, **ANY)
    assert len(set(calls)) == 2
    for t, (_, pairs) in enumerate(fits[1:]):
        assert {pair.prompt.text[:4] for pair in pairs} == {f"who{t}"}
        assert len(pairs) <= 5


# ---- The policy as its own judge ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("chatty"), initializer_range=0.2, max_position_embeddings=2048)


@pytest.fixture
def options(chatty: str, tmp_path: Path) -> dict[str, Any]:
    template = tmp_path / "own.jinja"
    template.write_text("{{ prompt }}|{{ completion }}")
    return {
        "model": chatty,
        "data": [{"prompt": f"question {i}"} for i in range(8)],
        "eval_data": [{"prompt": f"held out {i}"} for i in range(4)],
        "output": tmp_path / "run",
        "judge_template": str(template),
        "batch_size": 4,
        "max_new_tokens": 6,
        "lora": False,
        "lr": 1e-2,
        "dtype": "float32",
        "device": "cpu",
        "display": None,
        "eval_reward": "length:2",
    }


def test_a_policy_that_cannot_grade_is_reported_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"round 1: the judge gave no clear score to 32 of 32 .*--eft"):
        palate.train("self-rewarding", judge_reasoning=4, **options)


def test_each_version_of_the_policy_is_another_judge(options: dict[str, Any], tmp_path: Path) -> None:
    ranked = write(
        tmp_path / "ranked.jsonl",
        *({"prompt": f"r{i}", "completions": ["aaa", "a.."], "scores": [1, 0]} for i in range(3)),
    )
    outcome = palate.train(
        "self-rewarding", judge_mode="score", judge_label_mass=0, judge_data=ranked, **options
    )
    rows = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    means = [row["eval_judge/mean"] for row in rows if "eval_judge/mean" in row]
    assert len(means) == 3
    assert len(set(means)) == 3
    assert {"judge_accuracy_before", "judge_accuracy_after"} <= outcome.summary.keys()
    contests = [row for row in rows if "eval_round_win_rate" in row]
    assert [row["step"] for row in contests] == [2, 4]
    for row in contests:
        assert row["eval_round_win_rate_low"] <= row["eval_round_win_rate"] <= row["eval_round_win_rate_high"]
        assert row["eval_round_length"] > 0
        assert row["eval_round_length_before"] > 0
        assert row["eval_round_reward_before"] <= 0  # the reward is length:2
    with sqlite3.connect(outcome.directory / "journal.db") as db:
        (asked, known) = db.execute("SELECT count(*), count(DISTINCT key) FROM requests").fetchone()
    assert asked == known > 0


def test_a_run_that_is_killed_in_any_stage_judges_nothing_twice(
    soak: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    data = write(tmp_path / "prompts.jsonl", *({"prompt": f"question {i}"} for i in range(8)))
    eft = write(tmp_path / "eft.jsonl", *({"prompt": f"g{i}", "completion": "no"} for i in range(8)))
    ranked = write(
        tmp_path / "ranked.jsonl",
        *({"prompt": f"r{i}", "completions": ["aaa", "a.."], "scores": [1, 0]} for i in range(3)),
    )
    command = ["run", "self-rewarding", "--model", options["model"], "--data", data, "--eft", eft]
    command += ["--judge-data", ranked, "--eval-data", data, "--eval-reward", "length:2", "--eval-limit", "3"]
    command += ["--judge-mode", "score", "--judge-label-mass", "0", "--rounds", "2", "--batch-size", "4"]
    command += ["--judge-template", options["judge_template"], "--max-new-tokens", "6", "--no-lora"]
    command += ["--lr", "1e-2", "--dtype", "float32", "--device", "cpu", "--threads", "1"]
    command += ["--checkpoint-every", "1", "--sampling-rows", "4"]
    whole = soak.Trial(tmp_path, "whole", command)
    ended = whole.start()
    assert ended.returncode == 0, ended.stderr

    trial = soak.Trial(tmp_path, "killed", command)
    # In the lessons, in the samples of a round, between judgements, in DPO, in a measurement.
    for kill in ("learn:1:0", "sample:3:0", "judge:2:0", "learn:2:0", "journal:9:0"):
        ended = trial.start(kill=kill)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    ended = trial.start()
    assert ended.returncode == 0, ended.stderr
    assert trial.weights() == whole.weights()
    answered = "SELECT count(*), count(DISTINCT key) FROM requests WHERE done IS NOT NULL"
    with (
        sqlite3.connect(trial.directory / "journal.db") as db,
        sqlite3.connect(whole.directory / "journal.db") as other,
    ):
        assert len(set(db.execute(answered).fetchone())) == 1
        assert db.execute(answered).fetchone() == other.execute(answered).fetchone()


# ---- Options ------------------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    cfg = SelfRewardingConfig(data="x")
    assert (cfg.rounds, cfg.n, cfg.beta, cfg.temperature, cfg.top_p) == (2, 4, 0.1, 0.7, 0.9)
    assert (cfg.judge, cfg.judge_mode, cfg.judge_samples, cfg.tie) == ("self", "rubric", 3, 0.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"judge_mode": "pairwise"}, ("self", "pairwise", 3)),
        ({"judge": "local:big", "judge_samples": 5}, ("local:big", "rubric", 5)),
        ({"judge": {"model": "local:big", "samples": 5}}, ("local:big", "rubric", 5)),
        ({"judge": {"model": "self", "mode": "score"}}, ("self", "score", 3)),
        ({"reward": "sentiment"}, (None, None, 4)),
    ],
)
def test_other_judges(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    cfg = SelfRewardingConfig(data="x", **given)
    assert (cfg.judge, cfg.judge_mode, cfg.judge_samples) == expected
    again = SelfRewardingConfig.model_validate(cfg.model_dump())
    assert again == cfg


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"positive_score": 5.0}, "learn is pairs"),
        ({"length_tier": 0.1, "learn": "positives"}, "length_tier is set, but learn is positives"),
        ({"tie": 0.1, "learn": "positives"}, "tie is set, but learn is positives"),
        ({"beta": 0.3, "learn": "positives"}, "beta is set, but learn is positives"),
        ({"meta_rounds": 1}, "meta_rounds is set, but variant is self; use variant meta or leave"),
        ({"new_prompt_tokens": 9}, "new_prompt_tokens is set, but nothing writes new prompts"),
        ({"sft_epochs": 2}, "sft_epochs is set, but there are no lessons for M1; set ift or eft"),
        ({"sft_lr": 1e-3}, "sft_lr is set, but there are no lessons"),
        ({"judge_gap": 1}, "judge_gap is set, but nothing measures the judge; set judge_data"),
        ({"length_tier": 0.5}, "length_tier"),
        ({"n": 1}, "n"),
        ({"reward": "sentiment", "judge": "self"}, "give one of them"),
    ],
)
def test_numbers_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SelfRewardingConfig(data="x", **wrong)


# ---- Meta-rewarding -----------------------------------------------------------------------------------


def test_the_judge_learns_from_its_judged_gradings(
    options: dict[str, Any], fits: list[tuple[str, Sequence[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from palate.annotate.judges.local import LocalModel

    def grade(self: Any, questions: Sequence[Any], prompts: Sequence[Any]) -> list[Completion | None]:
        """Scores that differ between answers and between the gradings of some answers."""
        texts: list[Completion | None] = []
        for question in questions:
            points = (len(question.texts[0].encode()) + ord(question.prompt[-1]) * question.repeat) % 6
            written = question.template.mode == "rubric"
            text = f"Reason {question.repeat}.\nScore: {points}"
            texts.append(Completion(text, (1,) * 5, "eos") if written else None)
        return texts

    def asked(self: Any, logps: Any, question: Any) -> Any:
        """The meta-judge prefers the first grading, unless the other has more points; some are unparsed."""
        assert question.template.name == "meta"
        assert "Score:" in question.texts[0]
        first, second = (text[-1] for text in question.texts)
        if int(first) == int(second) + 1:
            return Reading("unparsed")
        return Reading("ok", (0.4, 0.6) if second > first else (0.6, 0.4))

    monkeypatch.setattr(LocalModel, "_write", grade)
    monkeypatch.setattr(LocalModel, "_reading", asked)
    outcome = palate.train("self-rewarding", variant="meta", meta_rounds=1, length_tier=0.4, **options)
    rows = [json.loads(line) for line in (outcome.directory / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row.get("round") == 1)
    later = next(row for row in rows if row.get("round") == 2)
    assert first["meta/pairs"] == first["meta/disputed"] > 0
    assert 0 < first["meta/first_wins"] < 1
    assert 0 < first["meta/unusable"] < 0.5
    assert "meta/pairs" not in later
    pairs = fits[0][1]
    gradings = [pair for pair in pairs if pair.chosen.policy_version is None]
    assert len(gradings) == first["meta/pairs"]
    assert len(pairs) == len(gradings) + first["pairs/kept"]
    for pair in gradings:
        assert pair.prompt.text.count("|") == 1  # the judge's question
        assert pair.chosen.text[-1] > pair.rejected.text[-1]
    with sqlite3.connect(outcome.directory / "journal.db") as db:
        (requests, known) = db.execute("SELECT count(*), count(DISTINCT key) FROM requests").fetchone()
    assert requests == known  # the gradings are read from the ledger


def test_the_context_is_checked_before_the_lessons(
    options: dict[str, Any], fits: list[tuple[str, Sequence[Any]]], tmp_path: Path
) -> None:
    short = tiny_model(tmp_path / "short", initializer_range=0.2, max_position_embeddings=512)
    ift = write(tmp_path / "ift.jsonl", {"prompt": "q", "completion": "a"})
    given = {**options, "model": short, "ift": ift, "judge_reasoning": 8}
    with pytest.raises(DataError, match="compares two gradings does not fit the model's context"):
        palate.train("self-rewarding", variant="meta", **given)
    assert not fits


@pytest.mark.parametrize(
    "wrong",
    [
        {"judge_mode": "score"},
        {"reward": "sentiment"},
        {"learn": "positives"},
        {"judge_samples": 1},
        {"judge_panel": ["local:other"]},
    ],
)
def test_meta_needs_a_judge_that_can_learn(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="variant is meta"):
        SelfRewardingConfig(data="x", variant="meta", **wrong)
