"""The rows of a run and their tokens in files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from palate.data import Account, read_comparisons, scan_comparisons
from palate.data.shelf import ShelfWriter
from palate.errors import DataError, RunError
from palate.learn import Policy
from palate.loops import Records, prompts_of, records_on_disk, rows_on_disk
from palate.loops.prepared import Repeats
from palate.loops.records import distinct, records_of
from palate.methods import METHODS
from palate.run import Run
from palate.testing import tiny_model, tiny_policy
from palate.types import Comparison, Prompt

Trial = Callable[..., "Attempt"]


class Attempt:
    """A start of a run that prepares its data: the records, the account, and the written shelves."""

    def __init__(self, records: Sequence[Any], account: Account, written: list[str]) -> None:
        self.records, self.account, self.written = records, account, written


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"q{i % 7}", "chosen": "yes" * (i % 3 + 1), "rejected": "no", "who": i} for i in range(40)
    ]
    rows += [{"prompt": "same", "chosen": "a" * 300 + "b", "rejected": "a" * 300 + "c"}]  # equal when cut
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def trial(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    """Prepares the data of a run as `palate run dpo` does."""
    models: dict[bool, str] = {}
    written: list[str] = []
    init = ShelfWriter.__init__

    def counted(self: ShelfWriter, path: Path, kinds: Any) -> None:
        written.append(path.name.partition("-")[0])
        init(self, path, kinds)

    monkeypatch.setattr(ShelfWriter, "__init__", counted)

    def make(*, chat: bool = True, max_length: int | None = None, output: str = "run") -> Attempt:
        if chat not in models:
            models[chat] = tiny_model(tmp_path / f"model-{chat}", chat=chat)
        policy = tiny_policy(Path(models[chat]), model={"max_length": max_length} if max_length else None)
        cfg = METHODS["dpo"].config.model_validate(
            {"model": models[chat], "data": str(source), "output": str(tmp_path / output), "device": "cpu"}
        )
        account = Account(max_bad_rows=0.1)
        written.clear()
        with Run(cfg, method="dpo") as run:
            rows = rows_on_disk(run, scan_comparisons, str(source), account)
            records = records_on_disk(run, policy.model.codec, rows, str(source), account)
        return Attempt(records, account, list(written))

    return make


def in_memory(policy: Policy, source: Path, account: Account) -> list[Any]:
    rows, _ = read_comparisons(str(source), account=account)
    records = records_of(policy, rows, str(source), account, policy.model.codec.pair)
    return distinct(records, str(source), account)


def test_records_are_those_of_memory(trial: Trial, source: Path, tmp_path: Path) -> None:
    made, account = trial(), Account()
    policy = tiny_policy(tmp_path / "model-True")
    expected = in_memory(policy, source, account)
    codec = policy.model.codec
    assert list(made.records) == expected
    assert [r.prompt.token_ids for r in made.records] == [codec.prompt_ids(r.prompt) for r in expected]
    assert [(r.prompt.columns, r.prompt.where) for r in made.records] == [
        (r.prompt.columns, r.prompt.where) for r in expected
    ]
    assert made.account == Account(**{**vars(account), "max_bad_rows": 0.1})
    assert made.records[3:9:2] == expected[3:9:2]
    assert [p.token_ids for p in prompts_of(made.records)[:2]] == [None, None]


def test_prepared_data_are_reused(trial: Trial) -> None:
    first, again = trial(), trial()
    assert (first.written, again.written) == (["rows", "tokens"], [])
    assert list(again.records) == list(first.records)
    assert again.account == first.account
    assert isinstance(again.records, Records)
    assert again.records.key == first.records.key  # type: ignore[attr-defined]


def test_the_lengths_are_numbers_in_a_file(trial: Trial, tmp_path: Path) -> None:
    # As JSON they would stay in memory, as an object each, for the whole run.
    made = trial()
    (description,) = (tmp_path / "run" / "prepared").glob("tokens-*.json")
    assert "lengths" not in json.loads(description.read_text())["facts"]["account"]
    assert isinstance(made.account.lengths, array)
    assert len(made.account.lengths) == 41
    assert trial().account.lengths == made.account.lengths


@pytest.mark.parametrize("contents", ["abc", "abcabca", "aaaa", "a", "bbab"])
def test_repeats_are_counted_as_with_a_set(contents: str) -> None:
    repeats, account, seen = Repeats(), Account(), set()
    rows = [Comparison(Prompt("Q", where=f"f:{i}"), "x", "y") for i in range(2 * len(contents))]
    for i, content in enumerate(contents):
        repeats.add(2 * i + 1, content.encode() * 16)  # the rows between cannot be used
        if content in seen:
            account.note("repeat", f"f:{2 * i + 1}")
        seen.add(content)
    assert repeats.tally(rows) == account.notes.get("repeat")


def test_repeats_take_few_bytes_per_row() -> None:
    repeats, rows = Repeats(), 20_000
    tracemalloc.start()
    for i in range(rows):
        repeats.add(i, hashlib.blake2b(str(i).encode(), digest_size=16).digest())
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 20 * rows
    assert repeats.tally([]) is None


def test_a_moved_run_reuses_its_data(trial: Trial, tmp_path: Path) -> None:
    trial()
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert trial(output="moved").written == []


def test_another_template_or_limit_makes_other_tokens(trial: Trial, tmp_path: Path) -> None:
    trial(output="a")
    for number, changes in enumerate(({"chat": False}, {"max_length": 100})):
        prepared = tmp_path / f"b{number}" / "prepared"
        fresh = trial(**changes, output=f"b{number}")
        shutil.rmtree(prepared)
        shutil.copytree(tmp_path / "a" / "prepared", prepared)
        again = trial(**changes, output=f"b{number}")
        assert again.written == ["tokens"]
        assert list(again.records) == list(fresh.records)
        assert again.account == fresh.account


def test_a_changed_file_of_the_same_size_and_time_is_read_again(trial: Trial, source: Path) -> None:
    first, times = trial(), source.stat()
    source.write_text(source.read_text().replace('"q1"', '"q9"'))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = trial()
    assert again.written == ["rows", "tokens"]
    assert again.records[1].prompt.content == "q9"
    assert again.records.key != first.records.key  # type: ignore[attr-defined]


def test_a_damaged_shelf_is_written_again(trial: Trial, tmp_path: Path) -> None:
    first = trial()
    (tokens,) = (tmp_path / "run" / "prepared").glob("tokens-*.tokens")
    os.truncate(tokens, 8)
    again = trial()
    assert again.written == ["tokens"]
    assert list(again.records) == list(first.records)


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    def add(self: ShelfWriter, name: str, values: bytes) -> None:
        if name == "tokens":
            raise error
        real(self, name, values)

    real = ShelfWriter.add
    with monkeypatch.context() as patch:
        patch.setattr(ShelfWriter, "add", add)
        yield


def test_a_full_disk_is_one_sentence_and_leaves_no_partial_files(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(28, "No space left on device")
    with (
        failing(monkeypatch, full),
        pytest.raises(RunError, match=r"No space left on device; .* free some space"),
    ):
        trial()
    assert not list((tmp_path / "run").glob("prepared/tokens-*"))
    assert trial().written[-1] == "tokens"


def test_an_interrupted_preparation_begins_again(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with failing(monkeypatch, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        trial()
    whole = trial()
    assert len(whole.records) == 40


def test_the_first_bad_row_of_strict_data_is_named(tmp_path: Path) -> None:
    source = tmp_path / "bad.jsonl"
    source.write_text('{"prompt": "q", "chosen": "a"}\nnot json\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:1: rejected is missing"):
        list(scan_comparisons(str(source), account=Account(strict=True)))
