"""Sampling one step ahead."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palate.cli import main
from palate.config import Sampling
from palate.learn import Policy
from palate.loops import annotated_samples
from palate.testing import FaultyServer, judge_reply
from palate.types import Group, Prompt


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("OPENAI_API_KEY", "k")

    def prefer(first: str, second: str) -> float:
        return 0.5 + 0.4 * ((first > second) - (first < second))

    with FaultyServer(lambda body, number: judge_reply(body, prefer), delay=lambda number: 0.01) as one:
        yield one


def words(tiny: str, output: Path, server: FaultyServer, *more: str) -> list[str]:
    data = output.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Q{i}"}) + "\n" for i in range(12)))
    return ["run", "oaif", "--model", tiny, "--data", str(data), "--output", str(output),
            "--dtype", "float32", "--device", "cpu", "--no-lora",
            "--max-new-tokens", "6", "--steps", "6", "--batch-size", "3",
            "--fresh-prompts", "0", "--probe-pairs", "0", "--lr", "0.01", "--checkpoint-every", "2",
            "--judge", f"server:m@{server.url}", *more]  # fmt: skip


def samples(output: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(output / "completions.parquet").to_pylist()
    return found


def weights(output: Path) -> bytes:
    return (output / "checkpoints" / "step-6" / "model.safetensors").read_bytes()


class Begins:
    """An annotator that records the groups that are begun."""

    def __init__(self) -> None:
        self.begun: list[Group] = []

    def begin(self, group: Group) -> None:
        self.begun.append(group)

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        assert {content_key(g) for g in groups} == {content_key(g) for g in self.begun}
        return [group.annotated((0.0,) * len(group.completions)) for group in groups]


def content_key(group: Group) -> tuple[str, tuple[str, ...]]:
    return group.prompt.text, tuple(completion.text for completion in group.completions)


@pytest.mark.parametrize("stop", [(), ("a", "e")])
def test_each_group_is_begun_once_before_the_batch_is_annotated(
    make_policy: Callable[..., Policy], stop: tuple[str, ...]
) -> None:
    annotate, prompts = Begins(), [Prompt(f"Q{i}") for i in range(5)]
    sampling = Sampling(max_new_tokens=8, sampling_rows=4, stop=stop)
    groups = annotated_samples(make_policy().snapshot(), annotate, prompts, 2, sampling, seed=1)
    assert len(groups) == len(annotate.begun) == 5


def test_a_batch_is_sampled_from_the_version_before_the_last_update(
    tiny: str, tmp_path: Path, server: FaultyServer
) -> None:
    assert main(words(tiny, tmp_path / "ahead", server, "--ahead", "1")) == 0
    assert main(words(tiny, tmp_path / "sync", server)) == 0
    versions = [row["policy_version"] for row in samples(tmp_path / "ahead")]
    assert versions == [max(0, step - 1) for step in range(6) for _ in range(6)]
    assert [row["policy_version"] for row in samples(tmp_path / "sync")] == [
        s for s in range(6) for _ in range(6)
    ]
    prompts = [[row["prompt"] for row in samples(tmp_path / name)] for name in ("ahead", "sync")]
    assert sorted(prompts[0]) == sorted(prompts[1])


def test_a_killed_run_ends_with_the_same_weights(tiny: str, tmp_path: Path, server: FaultyServer) -> None:
    assert main(words(tiny, tmp_path / "whole", server, "--ahead", "1")) == 0
    whole, before = weights(tmp_path / "whole"), len(server.requests)
    again = words(tiny, tmp_path / "killed", server, "--ahead", "1")
    killed = subprocess.Popen([sys.executable, "-m", "palate", *again])
    while not (tmp_path / "killed" / "checkpoints" / "step-4").exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert main(again) == 0
    assert weights(tmp_path / "killed") == whole
    questions = [body["messages"][0]["content"] for body in server.requests[before:]]
    assert len(questions) - len(set(questions)) <= 16  # requests that were in flight
