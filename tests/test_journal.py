from __future__ import annotations

import json
import math
import os
import re
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.errors import RunError
from palate.journal import FORMAT, Journal, Reward, content_key, group_key, key_of
from palate.memory import Memory
from palate.types import Completion, Content, Finish, Group, Prompt


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    made = Journal(path)
    yield made
    made.close()


def again(journal: Journal) -> Journal:
    """What another process would find."""
    journal.close()
    return Journal(journal.path)


def f32(value: float) -> float:
    """The float32 next to a number, as a model gives it."""
    return float(np.float32(value))


def completion(text: str = "a", ids: Sequence[int] = (1, 2), **more: Any) -> Completion:
    return Completion(text, tuple(ids), **more)


def bits(values: Sequence[float] | None) -> bytes | None:
    return None if values is None else struct.pack(f"{len(values)}d", *values)


def everything(c: Completion) -> tuple[Any, ...]:
    """All of a completion, to the last bit: `==` leaves the log-probabilities out."""
    return (c.text, c.token_ids, c.finish, c.policy_version, bits(c.logps), bits(c.sampling_logps))


CHAT: Content = ({"role": "system", "content": ""}, {"role": "user", "content": "näive\n🙂\x00"})


# ---- Completions -----------------------------------------------------------------------------------


def test_what_is_kept_is_what_comes_back(journal: Journal) -> None:
    prompts = [Prompt("Q"), Prompt(CHAT), Prompt("")]
    kept = [
        (
            completion("nul \x00 inside", (0, 2**31 - 1), logps=(-math.inf, f32(-0.1)), policy_version=3),
            completion("", (7,), finish="stop", logps=None, sampling_logps=(f32(-1e-30),)),
        ),
        (completion("👩‍👩‍👧\u202e", finish="length", logps=(-0.0, f32(1 / 3))), completion("\ufeff\uffff")),
        (completion(" \n\t", range(5), policy_version=None), completion("'; DROP TABLE chunks; --")),
    ]
    journal.keep_completions("k", 3, prompts, kept)
    found = again(journal).completions("k")
    assert found is not None
    assert [[everything(c) for c in group] for group in found] == [[everything(c) for c in g] for g in kept]
    assert all(type(c.token_ids[0]) is int for group in found for c in group)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    rows=st.lists(
        st.tuples(st.integers(0, 2**31 - 1), st.floats(max_value=0, allow_nan=False, width=32)),
        min_size=1,
        max_size=8,
    ),
    finish=st.sampled_from(["eos", "stop", "length"]),
    version=st.none() | st.integers(0, 10**9),
)
def test_any_completion_comes_back(
    text: str, rows: list[tuple[int, float]], finish: Finish, version: int | None
) -> None:
    ids, logps = zip(*rows, strict=True)
    made = Completion(text, ids, finish, version, logps, None if version is None else logps[::-1])
    journal = Journal(":memory:")
    journal.keep_completions("k", 0, [Prompt(text)], [[made]])
    ((found,),) = journal.completions("k") or []
    assert everything(found) == everything(made)
    (row,) = journal.table()
    assert (row["prompt"], row["completion"], row["tokens"]) == (text, text, len(ids))
    journal.close()


def test_groups_and_samples_come_back_in_their_order(journal: Journal) -> None:
    kept = [[completion(f"{i}.{j}", (i, j)) for j in range(12)] for i in range(12)]
    journal.keep_completions("k", 0, [Prompt(str(i)) for i in range(12)], kept)
    found = again(journal).completions("k")
    assert [[c.text for c in group] for group in found or []] == [[c.text for c in group] for group in kept]


def test_a_prompt_may_be_there_twice(journal: Journal) -> None:
    kept = [[completion("first")], [completion("second")]]
    journal.keep_completions("k", 0, [Prompt("Q"), Prompt("Q")], kept)
    assert [g[0].text for g in journal.completions("k") or []] == ["first", "second"]


def test_texts_of_another_purpose_are_kept_but_are_no_completions_of_the_policy(journal: Journal) -> None:
    journal.keep_completions("a", 0, [Prompt("Q")], [[completion("answer")]])
    journal.keep_completions("b", 0, [Prompt("Q")], [[completion("A is better")]], purpose="verdict")
    journal.keep_completions("c", 0, [Prompt("Q")], [[completion("new question")]], purpose="prompt")
    journal = again(journal)
    assert [row["completion"] for row in journal.table()] == ["answer"]
    assert [row["completion"] for row in journal.table("verdict")] == ["A is better"]
    assert [row["completion"] for row in journal.table("prompt")] == ["new question"]
    assert [group[0].text for group in journal.completions("b") or []] == ["A is better"]


def test_a_journal_is_a_memory(journal: Journal) -> None:
    memory: Memory = journal  # mypy checks the signatures
    memory.keep_completions("k", 0, [Prompt("Q")], [[completion("a")]])
    assert memory.completions("k") == journal.completions("k") is not None


def test_what_was_never_kept_is_not_known(journal: Journal) -> None:
    assert journal.completions("k") is None
    assert journal.rewards("k") is None
    assert journal.logps(["k"]) is None
    assert journal.metrics_of("k") is None
    assert journal.fact("k") is None
    assert journal.metrics() == list(journal.table()) == []


# ---- Rewards, log-probabilities, metrics, facts ----------------------------------------------------


def test_rewards_come_back(journal: Journal) -> None:
    kept: list[tuple[str, str, Sequence[Reward]]] = [
        ("one", "g", [("c", 0.1 + 0.2, {"a": 1 / 3, "b": None}), ("d", None, {"a": None, "b": -0.0})]),
        ("two", "g", [("c", math.inf, {}), ("c", -1e-308, {}), ("c", 3, {})]),
    ]
    journal.keep_rewards(kept)
    journal = again(journal)
    for key, _, group in kept:
        assert journal.rewards(key) == [(reward, parts) for _, reward, parts in group]


def test_rewards_said_again_replace_the_first(journal: Journal) -> None:
    for reward in (1.0, 2.0):
        journal.keep_rewards([("k", "g", [("c", reward, {})])])
    assert journal.rewards("k") == [(2.0, {})]


def test_the_first_log_probabilities_stay(journal: Journal) -> None:
    first = np.array([-math.inf, -1 / 3, -0.0, np.nextafter(np.float32(-1), np.float32(0))], np.float32)
    journal.keep_logps(1, {"a": first, "empty": np.array([], np.float32)})
    journal.keep_logps(2, {"a": first + 1, "b": first})
    found = again(journal).logps(["b", "a", "empty"])
    assert found is not None
    assert [row.tobytes() for row in found] == [first.tobytes(), first.tobytes(), b""]
    assert found[0].dtype == np.float32


def test_log_probabilities_are_all_known_or_none(journal: Journal) -> None:
    journal.keep_logps(0, {"a": np.zeros(2, np.float32)})
    assert journal.logps(["a", "b"]) is None
    assert journal.logps([]) == []


def test_metrics_come_back_in_order(journal: Journal) -> None:
    rows: list[dict[str, Any]] = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 0, "x": None}, {"step": 2}]
    for i, row in enumerate(rows):
        journal.add_metrics(row, key=f"key {i}" if i else None)
    journal = again(journal)
    assert journal.metrics() == rows
    assert journal.count_metrics() == len(rows)
    assert journal.metrics_of("key 1") == rows[1]


def test_facts(journal: Journal) -> None:
    journal.keep_fact("a", "1")
    journal.keep_fact("a", "2")
    journal = again(journal)
    assert journal.fact("a") == "2"
    assert journal.is_empty()  # nothing that cost anything


@pytest.mark.parametrize("what", ["completions", "rewards", "logps", "metrics"])
def test_a_journal_with_anything_in_it_is_not_empty(journal: Journal, what: str) -> None:
    assert journal.is_empty()
    match what:
        case "completions":
            journal.keep_completions("k", 0, [Prompt("Q")], [[completion()]])
        case "rewards":
            journal.keep_rewards([("k", "g", [("c", None, {})])])
        case "logps":
            journal.keep_logps(0, {"k": np.zeros(1, np.float32)})
        case _:
            journal.add_metrics({})
    assert not journal.is_empty()


# ---- Going back ------------------------------------------------------------------------------------


@pytest.fixture
def long(journal: Journal) -> Journal:
    """Five steps: a chunk, a log-probability, a reward and a row each; one measurement has a key."""
    for step in range(5):
        c = completion(str(step))
        journal.keep_completions(f"chunk {step}", step, [Prompt("Q")], [[c]])
        journal.keep_logps(step, {f"logp {step}": np.zeros(1, np.float32)})
        journal.keep_rewards([(f"reward {step}", "g", [(content_key(Prompt("Q"), c), 1.0, {})])])
        journal.add_metrics({"step": step}, key="measured" if step == 3 else None)
    journal.keep_fact("weights", "hash")
    return journal


def known(journal: Journal) -> tuple[list[int], list[int], list[int], list[int]]:
    """Steps of which completions, log-probabilities, rewards and metrics are there."""
    steps = range(5)
    return (
        [s for s in steps if journal.completions(f"chunk {s}") is not None],
        [s for s in steps if journal.logps([f"logp {s}"]) is not None],
        [s for s in steps if journal.rewards(f"reward {s}") is not None],
        [row["step"] for row in journal.metrics()],
    )


def test_rewinding_keeps_what_will_come_out_again(long: Journal) -> None:
    long.rewind(2, None)
    long = again(long)
    everything_ = [0, 1, 2, 3, 4]
    assert known(long) == (everything_, everything_, everything_, [0, 1])
    assert long.metrics_of("measured") is None
    assert long.fact("weights") == "hash"
    # What comes next is put behind, under the same key too.
    long.add_metrics({"step": 9}, key="measured")
    assert [row["step"] for row in long.metrics()] == [0, 1, 9]


def test_rewinding_drops_what_will_not(long: Journal) -> None:
    long.rewind(3, 2)
    long = again(long)
    # What was paid for stays: it is a matter of texts, not of the last bits.
    assert known(long) == ([0, 1, 2], [0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2])
    assert [row["completion"] for row in long.table()] == ["0", "1", "2"]
    long.keep_completions("chunk 3", 3, [Prompt("Q")], [[completion("new")]])
    assert [row["completion"] for row in long.table()] == ["0", "1", "2", "new"]


@pytest.mark.parametrize(("metrics", "left"), [(0, []), (5, [0, 1, 2, 3, 4]), (50, [0, 1, 2, 3, 4])])
def test_rewinding_to_the_ends(long: Journal, metrics: int, left: list[int]) -> None:
    long.rewind(metrics, 10)
    assert known(long)[3] == left
    assert known(long)[0] == [0, 1, 2, 3, 4]


# ---- Exports ---------------------------------------------------------------------------------------


def test_the_table_is_in_the_order_of_sampling(journal: Journal) -> None:
    chat = Prompt(CHAT)
    batches = {"z": [Prompt("Q"), chat], "a": [Prompt("R")]}
    for i, (key, prompts) in enumerate(batches.items()):
        journal.place = f"step {i + 1}"
        found = [[completion(f"{key}{p}{j}", range(j + 1), policy_version=i) for j in range(2)]
                 for p in range(len(prompts))]  # fmt: skip
        journal.keep_completions(key, i, prompts, found)
    both = [completion("z10", (0,)), completion("z11", (0, 1))]
    rewards = [(content_key(chat, c), reward, {}) for c, reward in zip(both, (0.25, None), strict=True)]
    journal.keep_rewards([("r", "g", rewards)])
    rows = list(again(journal).table())
    assert [row["completion"] for row in rows] == ["z00", "z01", "z10", "z11", "a00", "a01"]
    assert [row["tokens"] for row in rows] == [1, 2, 1, 2, 1, 2]
    assert [row["reward"] for row in rows] == [None, None, 0.25, None, None, None]
    assert [row["place"] for row in rows] == ["step 1"] * 4 + ["step 2"] * 2
    assert [row["policy_version"] for row in rows] == [0] * 4 + [1] * 2
    assert rows[2]["prompt"] == [dict(turn) for turn in CHAT if not isinstance(turn, str)]
    assert rows[0].keys() == {
        *("prompt", "completion", "reward", "finish", "tokens", "policy_version", "place")
    }


def test_the_table_tells_what_was_said_within_the_group(journal: Journal) -> None:
    # A judge may say of the same completion one thing beside one neighbour and another beside another.
    prompt, a, b, c = Prompt("Q"), completion("a"), completion("b"), completion("c")
    groups = [Group(prompt, (a, b)), Group(prompt, (a, c))]
    for i, group in enumerate(groups):
        journal.keep_completions(f"chunk {i}", 0, [prompt], [group.completions])
    for i, group in enumerate(reversed(groups)):
        rewards = [(content_key(prompt, one), 10.0 * i + j, {}) for j, one in enumerate(group.completions)]
        journal.keep_rewards([(f"said {i}", group_key(group), rewards)])
    assert [(row["completion"], row["reward"]) for row in again(journal).table()] == [
        *(("a", 10.0), ("b", 11.0)),
        *(("a", 0.0), ("c", 1.0)),
    ]


# ---- Files that are not right ----------------------------------------------------------------------


def filled(path: Path) -> None:
    journal = Journal(path)
    for i in range(40):
        found = [[completion("x" * 200, range(100), logps=[-0.5] * 100)]]
        journal.keep_completions(str(i), i, [Prompt(str(i))], found)
    journal.close()


def refusal(path: Path) -> str:
    """What is said of a file that is no journal; one line."""
    with pytest.raises(RunError) as caught:
        Journal(path)
    return str(caught.value)


def test_a_damaged_file_is_told(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    assert len(whole) > 40_000
    zeros = bytes(4096)
    damaged = {
        "no SQLite at all": b"Once upon a time. " * 500,
        "its first byte": bytes([whole[0] ^ 1]) + whole[1:],
        "half of it": whole[: len(whole) // 2],
        "half of a page": whole[: 4096 * 3 + 2048],
        "a few bytes": whole[:20],
        "pages zeroed": whole[:4096] + zeros * 6 + whole[4096 * 7 :],
        "the tables' page zeroed": whole[:100] + bytes(3996) + whole[4096:],
    }
    for what, data in damaged.items():
        path.write_bytes(data)
        told = refusal(path)
        assert re.fullmatch(r"journal '.*journal\.db' cannot be opened: .* --overwrite", told), (what, told)
        assert path.read_bytes() == data  # looking has made it no worse


def test_a_foreign_database_is_told_and_not_touched(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE photos (name)")
    db.commit()
    db.close()
    with pytest.raises(RunError, match=r"journal .* has format 0, expected 2"):
        Journal(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("photos",)]
    db.close()


@pytest.mark.parametrize("other", [FORMAT - 1, FORMAT + 1], ids=["older", "newer"])
def test_a_journal_of_another_format_is_refused(path: Path, other: int) -> None:
    filled(path)
    db = sqlite3.connect(path)
    db.execute(f"PRAGMA user_version = {other}")
    db.close()
    with pytest.raises(RunError, match=f"has format {other}, expected {FORMAT}; resume the run with"):
        Journal(path)


def test_an_empty_file_is_a_new_journal(path: Path) -> None:
    # What a kill leaves between making the file and its tables.
    path.touch()
    journal = Journal(path)
    assert journal.is_empty()
    journal.close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "nowhere" / "journal.db", tmp_path / "file" / "journal.db", tmp_path):
        with pytest.raises(
            RunError, match=r"cannot be opened: unable to open .* make its directory writable"
        ):
            Journal(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="make its directory writable"):
        Journal(tmp_path / "journal.db")


def test_a_file_that_cannot_be_written_any_more(journal: Journal) -> None:
    journal.add_metrics({"step": 1})
    journal._db.execute("PRAGMA query_only = 1")  # as a file system that was remounted read-only
    with pytest.raises(RunError, match=r"cannot be written: .* make its directory writable"):
        journal.add_metrics({"step": 2})
    assert again(journal).metrics() == [{"step": 1}]


def test_another_process_that_writes_is_named(journal: Journal) -> None:
    journal.add_metrics({}, key="a")
    with pytest.raises(RunError, match="another process is writing to it: wait until that has ended"):
        journal.add_metrics({}, key="a")


def test_a_full_disk_loses_nothing_that_was_kept(journal: Journal) -> None:
    journal.add_metrics({"step": 1})
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages}")
    large = completion("x" * 50_000)
    told = r"is full; free some space .*\(without --overwrite\): earlier results are safe"
    with pytest.raises(RunError, match=told):
        journal.keep_completions("k", 0, [Prompt("Q"), Prompt("R")], [[completion()], [large]])
    with pytest.raises(RunError, match=told):
        journal.add_metrics({"text": "x" * 50_000})
    assert journal.completions("k") is None  # nor half a chunk
    journal._db.execute("PRAGMA max_page_count = 100000")
    journal.keep_completions("k", 0, [Prompt("Q"), Prompt("R")], [[completion()], [large]])
    journal = again(journal)
    assert journal.metrics() == [{"step": 1}]
    assert [g[0].text for g in journal.completions("k") or []] == ["a", large.text]


def test_a_chunk_is_kept_whole_or_not_at_all(journal: Journal) -> None:
    journal.keep_completions("k", 0, [Prompt("Q")], [[completion("first")]])
    with pytest.raises(RunError, match="cannot be written"):
        journal.keep_completions("k", 0, [Prompt("new")], [[completion("second")]])
    assert [row["completion"] for row in journal.table()] == ["first"]
    # An error that is not the database's leaves nothing behind either, and no transaction open.
    with pytest.raises(OverflowError):
        journal.keep_completions("l", 0, [Prompt("new")], [[completion(ids=(2**40,))]])
    with pytest.raises(TypeError):
        journal.keep_rewards([("a", "g", [("c", 1.0, {}), ("d", 1.0, {"part": object()})])])  # type: ignore[dict-item]
    with pytest.raises(TypeError), journal._transaction():
        len(journal._db.execute("INSERT INTO meta VALUES ('a', 'b')"))  # type: ignore[arg-type]
    assert journal.fact("a") is None
    journal.keep_fact("a", "c")
    assert again(journal).fact("a") == "c"


# ---- Other processes -------------------------------------------------------------------------------

KILLED = """
import os, sys
from palate.journal import Journal
from palate.types import Completion, Prompt
journal = Journal(sys.argv[1])
chunk = [Prompt("Q"), Prompt("R")], [[Completion("a", (1,))], [Completion("b" * 9_000_000, (2,))]]
journal.keep_completions("whole", 0, *chunk)
journal._db.execute("PRAGMA cache_size = 10")  # so that much of the next is in the file before it is done
journal._db.set_trace_callback(lambda sql: os._exit(9) if sql == "COMMIT" else None)
journal.keep_completions("cut", 0, *chunk)
"""


def test_a_kill_within_a_chunk_leaves_nothing_of_it(path: Path) -> None:
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == 9
    assert path.with_name("journal.db-journal").stat().st_size > 0  # it was in the middle of it
    journal = Journal(path)
    assert journal.completions("cut") is None
    assert len(journal.completions("whole") or []) == 2
    assert len(list(journal.table())) == 2
    journal.close()


PARTS: list[Any] = [
    "sample",
    3,
    -0.1,
    None,
    True,
    "🙂\x00\ud800",
    [1, (2, 3)],
    {"b": 1, "a": {"z": [], "y": 2}},
]


def test_keys_are_the_same_in_every_process() -> None:
    code = f"from palate.journal import key_of; print(key_of(*{PARTS!r}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {key_of(*PARTS)}
    # A stored run is found by its keys. By hand, from JSON without blanks:
    # python -c 'import hashlib; print(hashlib.blake2b(b"[\"a\",1]", digest_size=16).hexdigest())'
    assert key_of("a", 1) == "484c670ce4753ed75a3cc908af49224a"


# ---- Keys ------------------------------------------------------------------------------------------


def test_keys_tell_apart_what_differs() -> None:
    different: list[tuple[Any, ...]] = [
        *[(), ("",), ("", ""), (None,), (0,), ("0",), (0.5,), (False,), ([],), ({},), ("a", "b"), ("ab",)],
        *[(["a", "b"],), (["a"], "b"), ({"a": 1},), ({"a": "1"},), ({"a": [1]},), ('a","b',)],
    ]
    assert len({key_of(*parts) for parts in different}) == len(different)
    assert len(key_of()) == 32


def test_keys_do_not_depend_on_the_order_of_columns() -> None:
    assert key_of({"a": 1, "b": {"c": 2, "d": 3}}) == key_of({"b": {"d": 3, "c": 2}, "a": 1})


def test_keys_of_large_arrays_tell_their_middles_apart() -> None:
    # numpy shows a long array by its ends.
    one, other = np.zeros(5000), np.zeros(5000)
    other[2500] = 1
    assert key_of({"column": one}) != key_of({"column": other})


def test_the_content_of_a_completion() -> None:
    base = completion("a", (1, 2))
    keys = [
        content_key(Prompt("Q"), base),
        content_key(Prompt("R"), base),
        content_key(Prompt("Q"), completion("b", (1, 2))),
        content_key(Prompt("Q"), completion("a", (1, 2, 3))),
        content_key(Prompt("Q"), completion("a", (1, 2), finish="length")),
    ]
    assert len(set(keys)) == len(keys)
    # Who sampled it, when and how likely it was is nothing to an annotator.
    again_ = completion("a", (1, 2), policy_version=4, logps=(-1.0, -2.0))
    assert content_key(Prompt("Q", {"column": 1}, "x:1"), again_) == keys[0]


def test_the_file_is_plain_sqlite(path: Path) -> None:
    # A person may look into it with any tool.
    filled(path)
    db = sqlite3.connect(path)
    (content,) = db.execute("SELECT content FROM prompts LIMIT 1").fetchone()
    assert json.loads(content) == "0"
    (ids,) = db.execute("SELECT token_ids FROM completions LIMIT 1").fetchone()
    assert np.frombuffer(ids, np.int32).tolist() == list(range(100))
    assert db.execute("PRAGMA journal_mode").fetchone() == ("delete",)  # network disks have no other
    db.close()
