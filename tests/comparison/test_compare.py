from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from palate.comparison import CompareConfig, compare_methods, shared, work
from palate.comparison.shared import read_all
from palate.data import read_comparisons, read_demonstrations
from palate.errors import ConfigError, DataError, RunError
from palate.launch import train
from palate.methods import METHODS
from palate.report.compared import QUALITY, matrix, table, write_comparison
from palate.settings import load_config
from palate.testing import Fault, FaultyServer, judge_reply
from palate.types import Completion, Group, Prompt


def config(tiny: str, output: Path, **settings: Any) -> CompareConfig:
    data = output.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(20)))
    test = output.parent / "test.jsonl"
    test.write_text("".join(json.dumps({"prompt": f"Other {i}?"}) + "\n" for i in range(6)))
    base = {
        "methods": "dpo,oaif", "seeds": 2, "data": str(data), "eval_data": str(test), "eval_split": "train",
        "output": output, "reward": "length:2", "gold": "length:4", "budget_steps": 2, "batch_size": 2,
        "lr": 0.01,
        "model": tiny, "max_new_tokens": 6, "points": 2, "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    given = {name: value for name, value in {**base, **settings}.items() if value is not None}
    return load_config(CompareConfig, file=None, flags=given, python=True)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs happen in this process, which is faster; returns the names of those that were done."""
    done: list[str] = []

    def train_all(
        jobs: Any, root: Path, *, at_once: int, display: Any, may_diverge: bool = False
    ) -> list[str]:
        for job in jobs:
            if not work_finished(job):
                done.append(job.name)
                train(job.method, **dict(job.values), output=job.directory, display=None)
        return []

    from palate.comparison.runs import finished as work_finished

    monkeypatch.setattr(work, "train_all", train_all)
    return done


def test_methods_by_seeds_with_a_report(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    cfg = config(tiny, tmp_path / "c")
    done = compare_methods(cfg)
    assert in_process == ["dpo-0", "dpo-1", "oaif-0", "oaif-1"]
    result = done.result
    assert result == json.loads((tmp_path / "c" / "summary.json").read_text())
    rows = {row["name"]: row for row in result["methods"]}
    for row in rows.values():
        assert row["completions"] == 16  # 2 steps x 2 records x 4: dpo's are those of its pool
        assert row["verdicts"] == 16
        assert row["win_rate_low"] <= row["win_rate"] <= row["win_rate_high"]
        assert len(row["reward_by_seed"]) == 2
        assert row["gold"] is not None
    cells = {(c["row"], c["column"]): c["rate"] for c in result["matrix"]["cells"]}
    assert cells["dpo", "oaif"] == pytest.approx(1 - cells["oaif", "dpo"])
    assert {p["arm"] for p in result["frontier"]} == {"dpo", "oaif"}
    assert len(result["differences"]) == 3  # two methods and the base
    page = write_comparison(result, done.samples, tmp_path / "report.html").read_text()
    assert "<script" not in page
    for name in ("dpo", "oaif", "before training"):
        assert name in page
    assert len(matrix(result)[1]) == 2
    assert len(table(result, QUALITY)[1]) == 2


def test_a_second_call_trains_only_what_is_new(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    first = compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1))
    again = compare_methods(config(tiny, tmp_path / "c", methods="oaif,dpo", seeds=1))
    assert in_process == ["oaif-0", "dpo-0"]
    old, new = first.result["methods"][0], again.result["methods"][0]
    assert old["reward"] == new["reward"]
    assert old["kl"] == new["kl"]


def test_other_settings_are_refused(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1))
    train_file = (tmp_path / "c" / "shared" / "train.jsonl").read_text()
    with pytest.raises(RunError, match="other settings: max_new_tokens"):
        compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1, max_new_tokens=7))
    with pytest.raises(RunError, match=r"other settings: beta; use"):
        compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1, passed={"beta": "0.3"}))
    with pytest.raises(RunError, match="other settings: limit, the prompts in the data"):
        compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1, limit=15))
    assert (tmp_path / "c" / "shared" / "train.jsonl").read_text() == train_file


def test_a_name_keeps_its_method_and_its_file(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("beta: 0.1\n")
    compare_methods(config(tiny, tmp_path / "c", methods=f"oaif:{file},s=oaif", seeds=1, points=1))
    file.write_text("beta: 0.5\n")
    for methods, words in (
        (f"oaif:{file}", "other settings: the method or the file of a;"),
        ("s=rft", "other settings: the method or the file of s;"),
    ):
        with pytest.raises(RunError, match=words):
            compare_methods(config(tiny, tmp_path / "c", methods=methods, seeds=1, points=1))
    assert in_process == ["a-0", "s-0"]


def test_an_interrupted_pool_is_paid_for_in_full(
    tiny: str, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    stops = True

    def reply(body: dict[str, Any], number: int) -> Any:
        if stops and number >= 20:
            return Fault(status=401, body=b"{}")
        return judge_reply(body, lambda one, other: 0.5 + 0.4 * (one > other))

    with FaultyServer(reply) as server:
        cfg = config(
            tiny, tmp_path / "c", methods="dpo", seeds=1, reward=(), gold=(), points=1, max_new_tokens=8,
            budget_steps=None, budget_verdicts=96,
            passed={"judge": f"server:m@{server.url}", "price_in": "1", "price_out": "1"},
        )  # fmt: skip
        with pytest.raises(DataError, match=r"no usable reward for \d+ of the base model's 32 completions"):
            compare_methods(cfg)
        stops = False
        (row,) = compare_methods(cfg).result["methods"]
    with closing(sqlite3.connect(tmp_path / "c" / "shared" / "pool" / "journal.db")) as db:
        ((answered,),) = db.execute("SELECT count(*) FROM verdicts WHERE status = 'ok'")
        # A request whose answer was lost counts as what it may have cost.
        ((cost,),) = db.execute(
            "SELECT sum(CASE WHEN done IS NULL THEN reserved_cost ELSE cost END) FROM requests"
        )
    assert (row["verdicts"], row["cost"]) == (answered, pytest.approx(cost))


def test_the_learning_rate_is_tuned_on_validation_prompts(
    tiny: str, tmp_path: Path, in_process: list[str]
) -> None:
    cfg = config(tiny, tmp_path / "c", methods="oaif", seeds=1, tune="lr", tune_factors="0.5,1")
    done = compare_methods(cfg)
    assert in_process == ["oaif-lr-0.005", "oaif-lr-0.01", "oaif-0"]
    trials = json.loads((tmp_path / "c" / "tuning.json").read_text())["oaif"]
    assert trials["chosen"] == done.result["methods"][0]["lr"]
    assert trials["rewards"][f"{trials['chosen']:g}"] == max(trials["rewards"].values())
    kept = (tmp_path / "c" / "shared" / "train.jsonl").read_text().splitlines()
    assert len(kept) == 16  # 4 of 20 are the validation split


def test_a_reward_model_is_trained_once_and_on_the_bill(
    tiny: str, tmp_path: Path, in_process: list[str]
) -> None:
    done = compare_methods(
        config(tiny, tmp_path / "c", methods="rft,dpo", seeds=1, learnt_reward=True, budget_steps=4)
    )
    assert in_process == ["reward-model", "rft-0", "dpo-0"]
    rows = {row["name"]: row for row in done.result["methods"]}
    assert rows["rft"]["completions"] > rows["dpo"]["completions"]
    values = (tmp_path / "c" / "runs" / "rft-0" / "config.json").read_text()
    assert "model:" in values


def test_a_judge_with_a_budget_of_verdicts(
    tiny: str, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with FaultyServer(
        lambda body, _: judge_reply(body, lambda one, other: 0.5 + 0.4 * (one > other))
    ) as server:
        done = compare_methods(
            config(
                tiny, tmp_path / "c", seeds=1, reward=(), gold=(), budget_steps=None, points=1,
                budget_verdicts=48,
                passed={"judge": f"server:m@{server.url}", "price_in": "1", "price_out": "1"},
            )
        )  # fmt: skip
    rows = {row["name"]: row for row in done.result["methods"]}
    assert done.result["pairwise"]
    for row in rows.values():
        assert row["verdicts"] <= 48  # 4 groups of 4: 12 questions each
        assert row["verdicts"] >= 40
        assert row["cost"] > 0
        assert 0 <= row["win_rate"] <= 1
    assert write_comparison(done.result, done.samples, tmp_path / "report.html").exists()


def test_a_reward_model_takes_the_place_of_the_judge(
    tiny: str, tmp_path: Path, in_process: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with FaultyServer(
        lambda body, _: judge_reply(body, lambda one, other: 0.5 + 0.4 * (one > other))
    ) as server:
        passed = {"judge": f"server:m@{server.url}", "price_in": "1", "price_out": "1", "probe_pairs": "0"}
        cfg = config(
            tiny, tmp_path / "c", methods="rft,oaif", seeds=1, reward=(), gold=(), points=1,
            learnt_reward=True, budget_steps=4, passed=passed,
        )  # fmt: skip
        done = compare_methods(cfg)
    assert in_process == ["reward-model", "rft-0", "oaif-0"]
    assert [row["name"] for row in done.result["methods"]] == ["rft", "oaif"]


def test_checkpoints_are_measured_at_the_temperature_of_the_comparison(
    tiny: str, tmp_path: Path, in_process: list[str]
) -> None:
    """A model that does not change has the same reward at every checkpoint, to within its few draws."""
    cfg = config(
        tiny, tmp_path / "c", methods="oaif", seeds=1, lr=1e-12, temperature=0.01, budget_steps=4, points=3
    )
    done = compare_methods(cfg)
    assert {round(point["reward"], 6) for point in done.result["frontier"]} == {
        round(done.result["base"]["reward"], 6)
    }


def test_what_spin_samples_itself_is_on_its_bill(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    cfg = config(
        tiny, tmp_path / "c", methods="spin", seeds=1, points=1, budget_steps=None, budget_verdicts=128
    )
    (row,) = compare_methods(cfg).result["methods"]
    share = METHODS["spin"].share
    assert share is not None
    assert row["completions"] % (share.n + share.own * share.rounds) == 0
    assert 0 < row["verdicts"] < row["completions"]


def test_an_output_that_cannot_be_a_directory(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    cfg = config(tiny, tmp_path / "c")
    for place, words in (("taken", "it is a file"), ("taken/inside", "Not a directory")):
        with pytest.raises(RunError, match=words):
            compare_methods(cfg.model_copy(update={"output": tmp_path / place}))


def test_damaged_settings_are_one_sentence(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "compare.json").write_text("{")
    with pytest.raises(RunError, match=r"compare\.json' is damaged"):
        compare_methods(config(tiny, tmp_path / "c"))
    assert in_process == []


def test_a_wrong_setting_is_found_before_the_annotator_is_asked(
    tiny: str, tmp_path: Path, in_process: list[str]
) -> None:
    (tmp_path / "odd.yaml").write_text("beta: -1\n")
    with pytest.raises(ConfigError, match="beta is -1"):
        compare_methods(config(tiny, tmp_path / "c", methods=f"dpo:{tmp_path / 'odd.yaml'}"))
    assert not list((tmp_path / "c" / "shared").glob("pairs-*"))
    assert in_process == []


def test_prompts_that_are_left_out_are_named(tiny: str, tmp_path: Path) -> None:
    cfg = config(tiny, tmp_path / "c", eval_limit=None)
    rows = [{"prompt": "Question 0?"}, {"prompt": "Question 0?"}, {"prompt": "New?"}, {"odd": 1}]
    Path(cfg.eval_data or "").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg.output.mkdir()
    said: list[str] = []
    prompts = read_all(cfg, said.append)
    assert (len(prompts.train), len(prompts.test)) == (19, 2)
    text = "\n".join(said)
    assert "1 training prompts are test prompts too and are left out" in text
    assert "1 rows repeat another row" in text
    assert "prompt is missing" in text


def test_the_budget_is_named_once(tiny: str, tmp_path: Path, in_process: list[str]) -> None:
    done = compare_methods(config(tiny, tmp_path / "c", methods="oaif", seeds=1, points=1))
    for budget, words in (
        ({"unit": "steps", "amount": 2, "steps": 2}, "may spend 2 optimizer steps; the table"),
        ({"unit": "prompts", "amount": 8, "steps": 1}, "prompts and about 1 optimizer step; the table"),
    ):
        page = write_comparison({**done.result, "budget": budget}, done.samples, tmp_path / "report.html")
        assert words in " ".join(page.read_text().split())


@pytest.mark.parametrize("kind", ["pairs", "demonstrations"])
def test_empty_completions_stay_out_of_the_pool(tmp_path: Path, kind: str) -> None:
    file, said = tmp_path / f"{kind}.jsonl", list[str]()
    answers = [Completion(text, (i,)) for i, text in enumerate((" \n", "a", "b"))]
    silent = Group(Prompt("q"), tuple(answers), (3.0, 2.0, 1.0))
    spoken = Group(Prompt("r"), tuple(answers[1:]), (2.0, 1.0))
    shared._write(file, kind, [silent, spoken], said.append)
    read = read_demonstrations(str(file)) if kind == "demonstrations" else read_comparisons(str(file))[0]
    assert [row.prompt.text for row in read] == ["r"]
    assert said == [f"{kind}.jsonl: 1 prompts are left out, because their best completion is empty"]
    with pytest.raises(DataError, match="is empty for all 1 prompts"):
        shared._write(file, kind, [silent], said.append)
