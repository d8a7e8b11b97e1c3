"""A real vLLM server with the embedded model; `PALATE_VLLM_PYTHON` names the Python of its environment."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import palate.pooling.work as work
from palate.config import LearnerConfig, Sampling
from palate.errors import RunError
from palate.learn import Likelihood, Policy
from palate.methods.oaif import OAIFConfig
from palate.model import load_model
from palate.model.batched import batched_logps
from palate.model.served import connect
from palate.model.served.connect import connected
from palate.model.served.process import PYTHON, ServerProcess
from palate.pool import read_facts, read_shard
from palate.pooling import PoolConfig, make_pool
from palate.types import Completion, Example, Group, Prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.embedded,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no environment with vLLM"),
]

STOP = ("p", "a", "e")
PROMPTS = [Prompt(({"role": "user", "content": f"Name a {thing}."},)) for thing in ("colour", "fish", "city")]


def sampling(**changes: Any) -> Sampling:
    return Sampling.model_validate({"max_new_tokens": 12, **changes})


def policy_of(lora: bool) -> Policy:
    cfg = LearnerConfig.model_validate(
        {"dtype": "float32", "device": "cpu", "lora": lora, "lr": 1e-3 if lora else 1e-4}
    )
    return Policy.load(cfg, total_steps=10)


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "all weights"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    """A policy whose completions come from a server that is started beside it."""
    policy = policy_of(request.param)
    arguments = ("--max-model-len=256", "--max-num-seqs=16")
    cfg = OAIFConfig.model_validate({"data": "-", "rollouts": "vllm", "vllm_args": arguments})
    policy.model.sampler = connected(
        cfg, policy.model, tmp_path_factory.mktemp("served"), remember=lambda own: own, say=print
    )
    yield policy
    policy.model.sampler.close()


def gap(policy: Policy, groups: list[Group]) -> float:
    """The largest difference between the server's and the policy's log-probabilities of a token."""
    ours = policy.snapshot().logps(groups).rows()
    theirs = [c.logps for g in groups for c in g.completions]
    return max(
        abs(a - b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.tolist(), y or (), strict=True)
    )


def texts(groups: list[Group]) -> list[str]:
    return [completion.text for group in groups for completion in group.completions]


def test_each_version_samples_with_its_own_weights(served: Policy) -> None:
    first = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    again = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    assert gap(served, first) < 1e-2
    ids = tuple(served.model.codec.tokenizer.encode("purple purple purple"))
    for _ in range(4):
        served.update([Example(p, Completion("", ids)) for p in PROMPTS], Likelihood())
    old = gap(served, first)
    second = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    assert gap(served, second) < 1e-2 < old
    assert texts(second) != texts(first)
    assert sum(a == b for a, b in zip(texts(first), texts(again), strict=True)) >= 4  # seeds; bits may differ


def test_end_tokens_and_stop_texts_are_in_the_tokens(served: Policy) -> None:
    end_ids = served.model.codec.end_ids
    groups = served.snapshot().sample(PROMPTS, 4, sampling(max_new_tokens=48, stop=STOP), seed=2)
    for completion in [c for group in groups for c in group.completions]:
        whole = served.model.codec.decode(completion.token_ids)
        assert {
            "eos": completion.token_ids[-1] in end_ids,
            "stop": any(s in whole for s in STOP),
            "length": True,
        }[completion.finish]
        assert not any(s in completion.text for s in STOP)
    assert any(c.finish == "stop" for group in groups for c in group.completions)
    long = served.snapshot().sample(PROMPTS, 4, sampling(min_new_tokens=8), seed=2)
    assert min(len(c.token_ids) for group in long for c in group.completions) >= 8


def test_a_pool_whose_server_is_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, prompts = tmp_path / "prompts.jsonl", [p.content for p in PROMPTS] * 2
    lines = [{"prompt": prompt, "place": i} for i, prompt in enumerate(prompts)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cfg = PoolConfig.model_validate(
        {"data": str(data), "output": tmp_path / "pool", "dtype": "float32", "device": "cpu", "n": 4}
        | {"shard_size": 2, "max_new_tokens": 24, "stop": STOP, "reward": ["length:8"], "rollouts": "vllm"}
        | {"vllm_args": ("--max-model-len=256", "--max-num-seqs=16")}
    )
    servers: list[ServerProcess] = []

    class Noted(ServerProcess):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            servers.append(self)

    def kills(*args: Any) -> None:
        os.killpg(servers[0]._process.pid, signal.SIGKILL)
        shown(*args)

    monkeypatch.setattr(connect, "ServerProcess", Noted)
    shown = work.shown
    with monkeypatch.context() as patch:
        patch.setattr(work, "shown", kills)
        with pytest.raises(RunError, match=r"has ended with exit code -9.*finished shards are kept"):
            make_pool(cfg)
    shards = tmp_path / "pool" / "shards"
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    made = make_pool(cfg)
    assert len(servers) == 2
    assert 1 <= len(before) < 3
    assert before.items() <= {path: path.stat().st_mtime_ns for path in shards.iterdir()}.items()
    entries = [entry for path in sorted(shards.iterdir()) for entry in read_shard(path)]
    assert Counter(entry.row for entry in entries) == Counter(range(len(prompts)))
    assert made.summary["completions"] == sum(len(entry.completions) for entry in entries) == len(prompts) * 4
    assert read_facts(made.directory).engine.startswith("vLLM ")
    model = load_model(cfg, trainable=False)
    rows = sorted(lines, key=lambda line: prompts.index(line["prompt"]))  # equal prompts are side by side
    records = [Example(Prompt(rows[e.row]["prompt"]), c) for e in entries for c in e.completions]
    gaps = [
        abs(a - b)
        for ours, record in zip(batched_logps(model, records, 2048).rows(), records, strict=True)
        for a, b in zip(ours.tolist(), record.completion.logps or (), strict=True)
    ]
    assert max(gaps) < 1e-2
