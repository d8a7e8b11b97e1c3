"""Sampling some steps ahead."""

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
import torch

from palate.cli import main
from palate.config import Sampling
from palate.learn import Likelihood, Policy
from palate.loops import Ahead, annotated_samples
from palate.loops.rollouts import importance_weights
from palate.methods.oaif import OAIFConfig
from palate.run import Run
from palate.testing import FaultyServer, judge_reply
from palate.types import Completion, Example, Group, Prompt


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


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_a_batch_is_sampled_from_the_version_some_updates_before(
    tiny: str, tmp_path: Path, server: FaultyServer, ahead: int
) -> None:
    assert main(words(tiny, tmp_path / "ahead", server, "--ahead", str(ahead))) == 0
    assert main(words(tiny, tmp_path / "sync", server)) == 0
    versions = [row["policy_version"] for row in samples(tmp_path / "ahead")]
    assert versions == [max(0, step - ahead) for step in range(6) for _ in range(6)]
    assert [row["policy_version"] for row in samples(tmp_path / "sync")] == [
        s for s in range(6) for _ in range(6)
    ]
    prompts = [[row["prompt"] for row in samples(tmp_path / name)] for name in ("ahead", "sync")]
    assert sorted(prompts[0]) == sorted(prompts[1])


@pytest.mark.parametrize("ahead", ["1", "3"])
def test_a_killed_run_ends_with_the_same_weights(
    tiny: str, tmp_path: Path, server: FaultyServer, ahead: str
) -> None:
    assert main(words(tiny, tmp_path / "whole", server, "--ahead", ahead)) == 0
    whole, before = weights(tmp_path / "whole"), len(server.requests)
    again = words(tiny, tmp_path / "killed", server, "--ahead", ahead)
    killed = subprocess.Popen([sys.executable, "-m", "palate", *again])
    while not (tmp_path / "killed" / "checkpoints" / "step-4").exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert main(again) == 0
    assert weights(tmp_path / "killed") == whole
    questions = [body["messages"][0]["content"] for body in server.requests[before:]]
    assert len(questions) - len(set(questions)) <= 16  # requests that were in flight


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_step_without_an_update_does_not_shift_the_versions_of_a_resumed_run(
    make_policy: Callable[..., Policy], tmp_path: Path, ahead: int
) -> None:
    # The policy does not learn in steps 1 and 3, so its version falls behind the step.
    def train(name: str, *, stop_after: int | None = None) -> list[tuple[int, list[str]]]:
        fixed = {"data": "-", "output": tmp_path / name, "steps": 6, "checkpoint_every": 1}
        cfg = OAIFConfig.model_validate(fixed | {"ahead": ahead, "max_new_tokens": 4, "batch_size": 2})
        seen = []
        with Run(cfg, method="oaif") as run:
            policy = make_policy(lr=0.1)
            run.attach(policy)
            batches = Ahead(
                policy, list, [Prompt(f"Q{i}") for i in range(5)], n=2, batch_size=2, steps=6,
                sampling=cfg.sampling, ahead=ahead, run=run,
            )  # fmt: skip
            for step in run.steps(6, policy):
                groups = batches.groups(step)
                completions = [c for group in groups for c in group.completions]
                seen.append((completions[0].policy_version or 0, [c.text for c in completions]))
                if step not in (1, 3):
                    policy.update([Example(groups[0].prompt, completions[0])], Likelihood())
                if step == stop_after:
                    break
        return seen

    whole = train("whole")
    before = [0, 1, 1, 2, 2, 3]  # the policy's version when each step begins
    assert [version for version, _ in whole] == [before[max(0, step - ahead)] for step in range(6)]
    train("stopped", stop_after=4)  # the checkpoint is that of step 4, after four finished steps
    assert train("stopped") == whole[4:]


def test_a_run_that_is_extended_samples_its_new_batches_now(
    tiny: str, tmp_path: Path, server: FaultyServer
) -> None:
    assert main(words(tiny, tmp_path / "run", server, "--ahead", "2")) == 0
    longer = words(tiny, tmp_path / "run", server, "--ahead", "2")
    longer[longer.index("--steps") + 1] = "8"
    assert main(longer) == 0
    versions = [row["policy_version"] for row in samples(tmp_path / "run")][::6]
    assert versions == [0, 0, 0, 1, 2, 3, 6, 6]


def test_tokens_of_an_older_policy_get_truncated_importance_weights() -> None:
    def completion(*logps: float) -> Completion:
        return Completion("x", (1,) * len(logps), logps=logps)

    groups = [Group(Prompt("q"), (completion(-1.0, -2.0), completion(-3.0)))]
    logps = torch.tensor([[-1.5, -2.0], [0.0, 9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    weights, numbers = importance_weights(logps, mask, groups, cap=2.0)
    torch.testing.assert_close(weights, torch.tensor([[0.60653066, 1.0], [2.0, 0.0]]))
    assert numbers["rollouts/weight"] == pytest.approx((0.60653066 + 1 + 2) / 3)
    assert numbers["rollouts/weight_capped"] == pytest.approx(1 / 3)
    assert numbers["rollouts/logp_difference"] == pytest.approx((0.5 + 0.0 + 3.0) / 3)


def test_policy_gradients_learn_from_batches_sampled_ahead(tiny: str, tmp_path: Path) -> None:
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Q{i}"}) + "\n" for i in range(8)))
    common = ["run", "rlhf", "--model", tiny, "--data", str(data), "--dtype", "float32", "--device", "cpu",
              "--reward", "length:3", "--steps", "4", "--batch-size", "4", "--max-new-tokens", "4",
              "--estimator", "rloo", "--centre-on", "none", "--lr", "0.01", "--ppo-epochs", "2"]  # fmt: skip
    assert main([*common, "--output", str(tmp_path / "ahead"), "--ahead", "2"]) == 0
    assert main([*common, "--output", str(tmp_path / "now")]) == 0
    lines = (tmp_path / "ahead" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "rollouts/weight" in row]
    assert len(rows) == 4
    assert rows[0]["rollouts/logp_difference"] < 1e-4  # the first batch is the current policy's
    assert rows[-1]["rollouts/logp_difference"] > 1e-4
    assert "rollouts/weight" not in (tmp_path / "now" / "metrics.jsonl").read_text()
    versions = [row["policy_version"] for row in samples(tmp_path / "ahead")]
    assert sorted(set(versions)) == [0, 2]  # two updates in each step
