from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palate.cli import main
from palate.config import DataConfig, RewardConfig
from palate.data import read_comparisons
from palate.errors import BudgetError, ConfigError, DataError, PalateError, RunError
from palate.labelling import label, measure
from palate.testing import Fault, FaultyServer, judge_reply

Row = dict[str, Any]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-labelling")
    with FaultyServer(lambda body, number: judge_reply(body, longer)) as one:
        yield one


def longer(first: str, second: str) -> float:
    """Prefers the longer text, and a little the text shown first."""
    return 0.5 + 0.4 * ((len(first) > len(second)) - (len(first) < len(second))) + 0.05


def write(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def judged(server: FaultyServer, **options: Any) -> RewardConfig:
    return RewardConfig(judge=f"server:m@{server.url}", price_in=1.0, price_out=1.0, **options)


PAIRS = [
    {"prompt": "Q1", "chosen": "long text", "rejected": "short", "topic": "a", "score_chosen": 3},
    {"prompt": "Q2", "chosen": "tiny", "rejected": "much longer", "topic": "b", "score_chosen": 4},
    {"prompt": "Q3", "chosen": "same!", "rejected": "equal", "topic": "c", "score_chosen": 5},
]


def test_pairs_get_the_judges_labels_and_both_orders(server: FaultyServer, tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    said: list[str] = []
    counts = label(DataConfig(data=str(data)), judged(server), output, say=said.append)
    first, second, third = read(output)
    assert (first["chosen"], first["rejected"], first["data_prefers"]) == ("long text", "short", "chosen")
    assert (second["chosen"], second["rejected"], second["data_prefers"]) == (
        "much longer",
        "tiny",
        "rejected",
    )
    assert first["p_chosen_shown_first"] == pytest.approx(0.95)
    assert first["p_chosen_shown_second"] == pytest.approx(0.85)
    assert second["score_chosen"] == pytest.approx(0.9)
    assert second["margin"] == pytest.approx(0.8)
    assert (third["status"], third["label"]) == ("tie", False)
    assert (first["topic"], first["data_score_chosen"]) == ("a", 3)  # the data's own columns stay
    assert any("score_chosen to data_score_chosen" in line for line in said)
    assert (counts.rows, counts.labelled, counts.ties, counts.changed) == (3, 2, 1, 1)
    assert first["judge_verdicts"] == 2
    total = sum(row["judge_cost"] for row in (first, second, third))
    assert total == pytest.approx(counts.metrics["judge/cost"])


def test_a_labelled_file_is_data_for_dpo_without_its_ties(server: FaultyServer, tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.parquet"
    label(DataConfig(data=str(data)), judged(server), output)
    pairs, same = read_comparisons(str(output))
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("long text", "short"),
        ("much longer", "tiny"),
    ]
    assert same == 0
    assert pairs[0].margin == pytest.approx(0.8)


def test_another_judge_relabels_the_labelled_file(server: FaultyServer, tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    label(DataConfig(data=str(data)), judged(server), one)
    label(DataConfig(data=str(one)), RewardConfig(reward=("length:1",)), two)
    rows = read(two)
    assert [row["data_prefers"] for row in rows] == ["rejected", "chosen", "chosen"]
    assert {row["judge"] for row in rows} == {"length:1"}
    assert "p_chosen_shown_first" not in rows[0]  # of the other judge


CHATS = [
    {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": text}]}
    for text in ("ok", "good day", "hm")
]


def test_completions_of_a_prompt_are_compared(server: FaultyServer, tmp_path: Path) -> None:
    data, output = write(tmp_path / "c.jsonl", CHATS), tmp_path / "out.jsonl"
    label(DataConfig(data=str(data)), judged(server), output)
    rows = read(output)
    assert [row["score"] for row in rows] == pytest.approx([0.3, 0.9, 0.3])
    assert rows[0]["completion"] == CHATS[0]["completion"]
    assert sum(row["judge_verdicts"] for row in rows) == 6


def test_completions_become_a_pair_of_best_and_worst(server: FaultyServer, tmp_path: Path) -> None:
    data, output = write(tmp_path / "c.jsonl", CHATS), tmp_path / "out.jsonl"
    label(DataConfig(data=str(data)), judged(server), output, pairs=True)
    (row,) = read(output)
    assert row["chosen"] == CHATS[1]["completion"]
    assert row["p_chosen_shown_second"] == pytest.approx(0.85)
    with pytest.raises(DataError, match="the annotator itself made this pair"):
        measure(str(output))
    label(DataConfig(data=str(data)), RewardConfig(reward=("length:1",)), tmp_path / "r.jsonl", pairs=True)
    (row,) = read(tmp_path / "r.jsonl")
    assert (row["chosen"], row["rejected"]) == (CHATS[0]["completion"], CHATS[1]["completion"])


def test_a_prompt_that_gives_no_pair_is_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in (("Q", "a"), ("Q", "b c"), ("R", "a"))]
    data, output = write(tmp_path / "c.jsonl", rows), tmp_path / "out.jsonl"
    command = ["annotate", str(data), "--reward", "length:1", "--pairs", "--output", str(output)]
    assert main(command) == 0
    assert "1 prompts have fewer than two usable scores" in capfd.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["unpaired"] == 1
    assert len(read(output)) == 1


def test_rewards_score_completions(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Q", "completion": "two words", "label": False, "score": 7},
        {"prompt": "R", "completion": "a"},
    ]
    data, output = write(tmp_path / "c.jsonl", rows), tmp_path / "out.parquet"
    label(DataConfig(data=str(data)), RewardConfig(reward=("length:2",)), output)
    first, second = pq.read_table(output).to_pylist()
    assert (first["score"], second["score"]) == (0.0, -0.5)
    assert (first["data_score"], first["data_label"]) == (7, False)  # a row marked false is labelled too


def ten(body: Row, number: int) -> Row:
    """The best score, in text."""
    return {"choices": [{"message": {"content": "10"}, "finish_reason": "stop"}]}


@pytest.mark.parametrize("mode", [None, "score"])
def test_a_truncated_completion_pays_its_penalty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    rows = [{"prompt": f"Q{i}", "completion": "a", "finish": end} for i, end in enumerate(("length", "eos"))]
    data, output = write(tmp_path / "c.jsonl", rows), tmp_path / "out.jsonl"
    with FaultyServer(ten) as server:
        cfg = judged(server, judge_mode=mode, judge_logprobs=False, missing_eos_penalty=0.75)
        label(DataConfig(data=str(data)), cfg, output)
    assert [row["score"] for row in read(output)] == [0.25, 1.0]


def test_bad_rows_are_counted_and_named(tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "Q4", "chosen": "", "rejected": "a"}]
    data, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "out.jsonl"
    counts = label(DataConfig(data=str(data)), RewardConfig(reward=("length:2",)), output)
    assert (counts.rows, counts.skipped) == (3, 1)
    (skipped,) = read(tmp_path / "out.jsonl.skipped.jsonl")
    assert skipped["where"].endswith("pairs.jsonl:4")
    with pytest.raises(DataError, match="chosen is empty"):
        label(DataConfig(data=str(data), strict=True), RewardConfig(reward=("length:2",)), output)


def test_an_unusable_verdict_is_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def some_fail(body: Row, number: int) -> Any:
        text = json.dumps(body)
        return Fault(400) if "tiny" in text else judge_reply(body, longer)

    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    with FaultyServer(some_fail) as server:
        counts = label(DataConfig(data=str(data)), judged(server), output)
    row = read(output)[1]
    assert (row["status"], row["label"], row["score_chosen"], row["margin"]) == (
        "unusable",
        False,
        None,
        None,
    )
    assert (row["chosen"], row["rejected"]) == ("tiny", "much longer")
    assert counts.unusable == 1


def test_a_limit_keeps_everything_and_no_file_appears(server: FaultyServer, tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    with pytest.raises(BudgetError, match="limit of 4 verdicts"):
        label(DataConfig(data=str(data)), judged(server, max_verdicts=4), output)
    assert not output.exists()
    label(DataConfig(data=str(data)), judged(server, max_verdicts=6), output)
    assert len(server.requests) == 6


def test_changed_rewards_are_refused(tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    label(DataConfig(data=str(data)), RewardConfig(reward=("length:2",)), output)
    with pytest.raises(RunError, match="the rewards or the code of a reward changed"):
        label(DataConfig(data=str(data)), RewardConfig(reward=("length:3",)), output)


def test_nothing_to_compare_is_a_mistake(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{i}", "completion": "a"} for i in range(3)]
    data = write(tmp_path / "c.jsonl", rows)
    cfg = RewardConfig(reward=("length:2",), label_noise=0.1)
    with pytest.raises(ConfigError, match="nothing to compare"):
        label(DataConfig(data=str(data)), cfg, tmp_path / "out.jsonl")


def test_label_noise_swaps_labels(tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    cfg = RewardConfig(reward=("length:1",), label_noise=1.0)
    label(DataConfig(data=str(data)), cfg, output)
    assert [row["data_prefers"] for row in read(output)] == ["chosen", "rejected", "chosen"]
    assert [row["status"] for row in read(output)] == ["labelled", "labelled", "tie"]


# ---- The command -----------------------------------------------------------------------------------


def test_a_killed_annotation_pays_for_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    rows = [{"prompt": f"Q{i}", "chosen": "a" * (i % 5 + 2), "rejected": "b"} for i in range(80)]
    data, output = write(tmp_path / "pairs.jsonl", rows), tmp_path / "out.parquet"
    with FaultyServer(lambda body, number: judge_reply(body, longer), delay=lambda number: 0.02) as server:
        words = ["annotate", str(data), "--output", str(output), "--judge", f"server:m@{server.url}",
                 "--judge-concurrency", "4"]  # fmt: skip
        killed = subprocess.Popen([sys.executable, "-m", "palate", *words])
        while len(server.requests) < 60 and killed.poll() is None:
            time.sleep(0.005)
        assert killed.poll() is None, "it was killed in the middle"
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert not output.exists()
        assert main([*words, "--json"]) == 0
        twice = sum(count - 1 for count in server.delivered.values())
    assert twice <= 4  # requests that were in flight
    counts = json.loads(capfd.readouterr().out)
    assert (counts["rows"], counts["labelled"]) == (80, 80)


def test_the_command_needs_an_annotator_and_an_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    assert main(["annotate", str(data)]) == 2
    assert "output is missing" in capfd.readouterr().err
    assert main(["annotate", str(data), "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "no annotator is given" in capfd.readouterr().err


def test_the_data_are_not_overwritten(tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", PAIRS)
    before = data.read_bytes()
    with pytest.raises(DataError, match="it is the data to read"):
        label(DataConfig(data=str(data)), RewardConfig(reward="length:3"), data)
    assert data.read_bytes() == before


def test_verdicts_are_shared_by_a_cache(server: FaultyServer, tmp_path: Path) -> None:
    data, cache = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "verdicts.db"
    for name, asked in (("a.jsonl", 6), ("b.jsonl", 0)):
        before = len(server.requests)
        label(DataConfig(data=str(data)), judged(server, verdict_cache=cache), tmp_path / name)
        assert len(server.requests) - before == asked
    assert [row["margin"] for row in read(tmp_path / "a.jsonl")] == [
        row["margin"] for row in read(tmp_path / "b.jsonl")
    ]


def test_a_misspelt_reward_can_be_corrected(tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    with pytest.raises(PalateError, match="lenght"):
        label(DataConfig(data=str(data)), RewardConfig(reward="lenght:3"), output)
    assert label(DataConfig(data=str(data)), RewardConfig(reward="length:3"), output).rows == 3


def test_other_rewards_name_the_file_to_delete(tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    label(DataConfig(data=str(data)), RewardConfig(reward="length:3"), output)
    with pytest.raises(RunError, match=r"delete .*out\.jsonl\.journal\.db to start over") as error:
        label(DataConfig(data=str(data)), RewardConfig(reward="length:4"), output)
    assert "--overwrite" not in str(error.value)


def test_a_place_that_cannot_be_locked_is_not_another_process(tmp_path: Path) -> None:
    data, output = write(tmp_path / "pairs.jsonl", PAIRS), tmp_path / "out.jsonl"
    output.with_name(f".{output.name}.lock").mkdir()
    with pytest.raises(RunError, match="accepts no new files"):
        label(DataConfig(data=str(data)), RewardConfig(reward="length:3"), output)
