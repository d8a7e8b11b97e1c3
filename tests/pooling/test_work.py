from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import palate.pooling.work as work
from palate.errors import AnnotatorError, BudgetError, ConfigError, DataError, RunError
from palate.pool import read_facts, read_shard
from palate.pooling import make_pool
from palate.pooling.shards import EMPTY, NO_REWARD
from palate.testing import FaultyServer, judge_reply

Reward = Callable[[str], list[str]]


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(directory / "shards").to_pylist())


def keys_of(directory: Path) -> Counter[tuple[int, int]]:
    return Counter((row["prompt_row"], row["sample"]) for row in rows_of(directory))


def complete(prompts: int = 8, n: int = 3) -> Counter[tuple[int, int]]:
    return Counter((row, sample) for row in range(prompts) for sample in range(n))


class Killed(BaseException):
    """A death at a chosen place, which no code may catch."""


def dying(monkeypatch: pytest.MonkeyPatch, name: str, *, after: int) -> None:
    """Let a function of the work raise on its call number `after`, counted from 0."""
    real, calls = getattr(work, name), [0]

    def dies(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] > after:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(work, name, dies)


# ---- A pool -----------------------------------------------------------------------------------------


def test_a_pool_has_each_row_once_and_counts_them(configure: Any) -> None:
    cfg = configure()
    made = make_pool(cfg)
    assert keys_of(made.directory) == complete()
    assert sorted(path.name for path in (made.directory / "shards").iterdir()) == [
        f"{i:05d}.parquet" for i in range(4)
    ]
    rows = rows_of(made.directory)
    assert made.summary["completions"] == len(rows) == 24
    assert made.summary["tokens"] == sum(row["tokens"] for row in rows)
    assert made.summary["mean_reward"] == pytest.approx(sum(row["reward"] for row in rows) / 24)
    assert json.loads((made.directory / "summary.json").read_text()) == made.summary
    assert {row["place"] for row in rows} == set(range(8))
    facts = read_facts(made.directory)
    assert (facts.n, facts.prompts, facts.shards, facts.scope) == (3, 8, 4, "completion")


def test_the_division_into_files_changes_no_completion(configure: Any, tmp_path: Path) -> None:
    # Seeds belong to prompts, so no two workers draw the same numbers for different prompts.
    one = rows_of(make_pool(configure()).directory)
    other = rows_of(make_pool(configure(shard_size=5, output=tmp_path / "other")).directory)
    assert [row["token_ids"] for row in one] == [row["token_ids"] for row in other]
    assert len({tuple(row["token_ids"]) for row in one}) > 20


def test_the_same_prompt_with_other_columns_gets_other_draws(configure: Any) -> None:
    given = [{"prompt": f"q{i % 4}", "place": i} for i in range(8)]
    rows = rows_of(make_pool(configure(given, shard_size=1)).directory)
    assert {row["place"] for row in rows} == set(range(8))
    drawn = [tuple(row["token_ids"]) for row in rows if row["prompt"] == "q0"]
    assert len(drawn) == 6
    assert len(set(drawn)) > 3


def test_a_finished_pool_is_left_as_it_is(configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_pool(configure())
    before = {path: path.stat().st_mtime_ns for path in (first.directory / "shards").iterdir()}
    dying(monkeypatch, "begin_shard", after=0)
    again = make_pool(configure())
    assert again.summary == first.summary
    assert before == {path: path.stat().st_mtime_ns for path in (first.directory / "shards").iterdir()}


def test_method_fills_in_its_own_options(configure: Any) -> None:
    cfg = configure(method="rso", n=5)
    assert (cfg.n, cfg.temperature, cfg.top_k, cfg.max_new_tokens) == (5, 0.7, 40, 6)
    assert configure(method="click").top_p == 0.9
    with pytest.raises(ConfigError, match=r"method is 'rs0', which reads no pool.*did you mean rso\?"):
        configure(method="rs0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 3}, "workers has no effect without ray"),
        ({"judge": "self", "reward": []}, "a pool trains no policy"),
        ({"n": 0}, "n is 0"),
    ],
)
def test_options_without_sense_are_refused(configure: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(**options)


# ---- Killed, and started again ----------------------------------------------------------------------


@pytest.mark.parametrize("place", ["begin_shard", "write_shard", "read_shard"])
@pytest.mark.parametrize("after", [0, 3])
def test_a_kill_loses_no_finished_shard_and_pays_nothing_twice(
    configure: Any, functions: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, after: int
) -> None:
    cfg = configure(reward=functions("    return [float(len(c)) for c in completions]\n"))
    with monkeypatch.context() as patch:
        dying(patch, place, after=after)
        with pytest.raises(Killed):
            make_pool(cfg)
    before = {path: path.stat().st_mtime_ns for path in (cfg.output / "shards").glob("*.parquet")}
    make_pool(cfg)
    assert keys_of(cfg.output) == complete()
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    assert (tmp_path / "asked").read_text() == "x" * 24
    assert list((cfg.output / "sampled").iterdir()) == []


def test_samples_are_not_drawn_again_after_a_kill_in_scoring(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Another engine may draw otherwise the second time, and verdicts on the first draw would be lost.
    cfg = configure()
    with monkeypatch.context() as patch:
        patch.setattr("palate.pooling.shards.Scoring.__call__", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make_pool(cfg)
    (kept,) = (cfg.output / "sampled").iterdir()
    drawn = read_shard(kept)
    make_pool(cfg)
    again = read_shard(cfg.output / "shards" / kept.name)
    assert [e.completions for e in again] == [e.completions for e in drawn]


def test_sigkill(configure: Any, functions: Reward, tmp_path: Path) -> None:
    # The process kills itself in its third shard, in the middle of a write.
    cfg = configure(reward=functions("    return [float(len(c)) for c in completions]\n"))
    code = (
        "import os, signal, sys, json, pyarrow.parquet as pq\n"
        "from palate.pooling import PoolConfig, make_pool\n"
        "write, calls = pq.write_table, []\n"
        "def dies(table, file):\n"
        "    calls.append(1)\n"
        "    write(table, file)\n"
        "    if len(calls) == 5: file.truncate(40); file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "pq.write_table = dies\n"
        "make_pool(PoolConfig.model_validate_json(sys.argv[1]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, cfg.model_dump_json()], check=False, env=os.environ)
    assert ended.returncode == -signal.SIGKILL
    assert len(list((cfg.output / "shards").glob("*.parquet"))) == 2
    assert list((cfg.output / "sampled").glob(".*.part"))
    make_pool(cfg)
    assert keys_of(cfg.output) == complete()
    assert (tmp_path / "asked").read_text() == "x" * 24
    assert list((cfg.output / "sampled").iterdir()) == []


def test_another_configuration_is_refused_and_destroys_nothing(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        dying(patch, "begin_shard", after=1)
        with pytest.raises(Killed):
            make_pool(configure())
    with pytest.raises(RunError, match=r"temperature is 1.0 there and 0.5 here"):
        make_pool(configure(temperature=0.5))
    assert len(list((configure().output / "shards").iterdir())) == 1


def test_another_model_under_the_same_name_is_refused(
    configure: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        dying(patch, "begin_shard", after=1)
        with pytest.raises(Killed):
            make_pool(configure())
    monkeypatch.setattr(work, "start_hash", lambda model: "0" * 64)
    with pytest.raises(RunError, match=r"the model .* changed since the pool in .* was begun"):
        make_pool(configure())


# ---- Bad rows ---------------------------------------------------------------------------------------


def test_a_function_that_raises_for_a_row_costs_that_row(
    configure: Any, functions: Reward, tmp_path: Path
) -> None:
    body = (
        "    if any(p == 3 for p in place): raise KeyError('answer')\n    return [1.0 for _ in completions]\n"
    )
    made = make_pool(configure(reward=functions(body)))
    rows = rows_of(made.directory)
    bad = [row for row in rows if row["error"] not in (None, EMPTY)]
    assert {row["place"] for row in bad} == {3}
    assert all(row["reward"] is None for row in bad)
    assert all("raised KeyError: 'answer'" in row["error"] for row in bad)
    assert made.summary["without_reward"] == len(bad) == 3
    assert all(row["reward"] == 1.0 for row in rows if row["place"] != 3)


@pytest.mark.parametrize(
    "body",
    [
        "    return ['high' if p == 3 else 1.0 for p in place]\n",
        "    return [1.0 for p in place if p != 3]\n",
        "    return [None if p == 3 else 1.0 for p in place]\n",
        "    return [float('nan') if p == 3 else 1.0 for p in place]\n",
    ],
)
def test_a_function_that_gives_no_number_costs_that_row(configure: Any, functions: Reward, body: str) -> None:
    made = make_pool(configure(reward=functions(body)))
    rows = rows_of(made.directory)
    assert {row["place"] for row in rows if row["reward"] is None} == {3}
    assert all(row["error"] for row in rows if row["place"] == 3)
    assert made.summary["without_reward"] == 3


def test_a_failure_that_passes_costs_nothing(configure: Any, functions: Reward, tmp_path: Path) -> None:
    body = f"    if not __import__('os').path.exists({str(tmp_path / 'up')!r}): raise OSError('no network')\n"
    cfg = configure(reward=functions(body + "    return [1.0 for _ in completions]\n"), shard_size=4)
    with pytest.raises(AnnotatorError, match="no network"):
        make_pool(cfg)
    (tmp_path / "up").touch()
    made = make_pool(cfg)
    assert made.summary["without_reward"] == 0
    assert made.summary["mean_reward"] == 1.0


def test_a_function_that_always_fails_ends_the_pool_and_can_be_repaired(
    configure: Any, functions: Reward
) -> None:
    cfg = configure(reward=functions("    raise OSError('no network')\n"), shard_size=4)
    with pytest.raises(AnnotatorError, match="raised OSError: no network"):
        make_pool(cfg)
    assert not list((cfg.output / "shards").glob("*"))
    assert list((cfg.output / "sampled").iterdir())  # the samples are kept
    functions("    return [1.0 for _ in completions]\n")
    assert make_pool(cfg).summary["mean_reward"] == 1.0


def test_another_code_is_refused_once_a_shard_is_scored(
    configure: Any, functions: Reward, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configure(reward=functions("    return [1.0 for _ in completions]\n"))
    with monkeypatch.context() as patch:
        dying(patch, "begin_shard", after=1)
        with pytest.raises(Killed):
            make_pool(cfg)
    functions("    return [2.0 for _ in completions]\n")
    with pytest.raises(RunError, match=r"the reward rewards\.py changed since the pool in"):
        make_pool(cfg)


def test_another_code_gives_all_rewards_before_a_shard_is_scored(configure: Any, functions: Reward) -> None:
    # Interrupted in the first shard, whose first rows have rewards of the earlier code.
    body = (
        "    for p in place:\n"
        "        if p == 1: raise OSError if len(place) > 1 else KeyboardInterrupt\n"
        "        yield 1.0\n"
    )
    cfg = configure(reward=functions(body))
    with pytest.raises(KeyboardInterrupt):
        make_pool(cfg)
    functions("    return [2.0 for _ in completions]\n")
    assert {row["reward"] for row in rows_of(make_pool(cfg).directory)} == {2.0}


def test_a_prompt_that_is_too_long_is_one_row(configure: Any) -> None:
    given = [{"prompt": "x" * 300 if i == 2 else f"q{i}", "place": i} for i in range(8)]
    made = make_pool(configure(given))
    (row,) = [row for row in rows_of(made.directory) if row["place"] == 2]
    assert (row["completion"], row["sample"], row["reward"]) == (None, None, None)
    assert "the prompt has 300 tokens" in row["error"]
    assert made.summary["failed_prompts"] == 1
    assert made.summary["completions"] == 21


def test_prompts_that_are_all_too_long_end_the_pool(configure: Any) -> None:
    with pytest.raises(DataError, match="leaves no room"):
        make_pool(configure([{"prompt": "x" * 300, "place": i} for i in range(3)] + [{"prompt": "y" * 300}]))


def test_empty_completions_are_counted_and_named(configure: Any) -> None:
    made = make_pool(configure(stop=[chr(c) for c in range(32, 127)], n=8))
    rows = rows_of(made.directory)
    empty = [row for row in rows if not row["completion"].strip()]
    assert {row["error"] for row in empty} <= {EMPTY}
    assert made.summary["empty"] == len(empty) > 0
    assert all(row["reward"] is not None for row in empty)  # a method that samples itself scores them too


def test_a_completion_without_reward_and_without_reason_says_so(configure: Any, functions: Reward) -> None:
    made = make_pool(configure(reward=functions("    return [None if p == 3 else 1.0 for p in place]\n")))
    assert {row["error"] for row in rows_of(made.directory) if row["place"] == 3} <= {NO_REWARD, EMPTY}


# ---- Judges -----------------------------------------------------------------------------------------


def test_a_judge_is_paid_once_and_its_budget_ends_the_pool(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyServer(
        lambda body, _: judge_reply(body, lambda a, b: 0.9 if len(a) > len(b) else 0.2)
    ) as server:
        judge = {"judge": f"server:m@{server.url}", "reward": [], "price_in": 1.0, "price_out": 1.0}
        with pytest.raises(BudgetError):
            make_pool(configure(**judge, max_verdicts=20))
        made = make_pool(configure(**judge))
        asked = len(server.requests)
        assert max(server.delivered.values()) == 1
        assert made.summary["judge_verdicts"] == asked
        assert made.summary["judge_cost"] > 0
        assert read_facts(made.directory).scope == "group"
        assert keys_of(made.directory) == complete()
        make_pool(configure(**judge))
        assert len(server.requests) == asked
    assert (made.directory / "verdicts.db").exists()
