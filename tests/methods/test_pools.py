"""The methods that can read a pool learn from it what they would learn from their own samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import palate.loops.candidates as candidates
from palate import loops
from palate.annotate import annotator, scored
from palate.learn import Policy
from palate.loops import pool_bill
from palate.methods import METHODS
from palate.pooling import Made, PoolConfig, make_pool
from palate.run import Run
from palate.settings import load_config
from palate.testing import ScriptedScorer
from palate.types import Completion, Prompt

READERS = [name for name, method in METHODS.items() if "pool" in method.config.model_fields]

REWARD = "length:3"
SHARED = {"max_new_tokens": 8, "n": 6, "seed": 3}
OPTIONS: dict[str, dict[str, Any]] = {
    "click": {"threshold": -0.6, "direction": "either"},
    "rest": {"threshold_by": "quantile", "thresholds": (0.3, 0.6)},
    "rft": {"rounds": 1},
    "rrhf": {},
    "rso": {"accept": 4, "sample_beta": 0.2},
    "slic-hf": {},
}

Learnt = list[tuple[str, tuple[Completion, ...], Any]]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(12)))
    return file


@pytest.fixture
def pool_of(base: str, prompts: Path, tmp_path: Path) -> Callable[..., Made]:
    """Makes a pool for a method from the tiny model."""

    def make(method: str, **options: Any) -> Made:
        fixed = {"data": str(prompts), "model": base, "dtype": "float32", "device": "cpu", "shard_size": 5}
        place = {"method": method, "output": tmp_path / f"pool-{method}"}
        flags = fixed | SHARED | {"reward": [REWARD]} | place | options
        return make_pool(load_config(PoolConfig, file=None, flags=flags, python=True))

    return make


@pytest.fixture
def learn(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Learnt, dict[str, float]]]:
    """Runs a method; returns the records that it fits, and its bill for the pool."""
    seen: Learnt = []
    fit = loops.fit

    def spy(policy: Any, records: Sequence[Any], *args: Any, **options: Any) -> None:
        for record in records:
            kept = getattr(record, "rewards", None), getattr(record, "margin", None)
            seen.append((record.prompt.text, record.completions, kept))
        fit(policy, records, *args, **options)

    monkeypatch.setattr(loops, "fit", spy)
    monkeypatch.setattr(candidates, "fit", spy)

    def go(method: str, annotate: Any = None, **options: Any) -> tuple[Learnt, dict[str, float]]:
        seen.clear()
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        fixed = {"model": base, "data": "-", "output": output, "dtype": "float32", "device": "cpu"}
        small = {"steps": 1, "batch_size": 4, "lora": True, "lr": 1e-3}
        cfg = METHODS[method].configure(
            small | fixed | SHARED | {"reward": [REWARD]} | OPTIONS[method] | options
        )
        with Run(cfg, method=method) as run:
            policy = Policy.load(cfg, total_steps=1, seed=run.seed("adapter"))
            ask = annotate or annotator([REWARD])
            METHODS[method].train(policy, ask, [Prompt(f"q{i}") for i in range(12)], cfg, run)
            return list(seen), pool_bill(run)

    return go


def test_these_methods_read_a_pool() -> None:
    assert sorted(READERS) == sorted(OPTIONS)


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_a_pool_gives_the_same_records(pool_of: Any, learn: Any, method: str) -> None:
    made = pool_of(method)

    def refuse(*_: Any) -> None:
        raise AssertionError("the rewards are in the pool")

    own, nothing = learn(method)
    read, bill = learn(method, refuse, pool=made.directory)
    assert own == read
    assert own
    assert nothing == {}
    assert bill["pool_completions"] == made.summary["completions"] == bill["pool_verdicts"] == 72
    assert bill["pool_tokens"] == made.summary["tokens"]


@pytest.mark.parametrize("method", ["rso", "rft"])
def test_a_pool_without_rewards_is_scored_by_the_run(pool_of: Any, learn: Any, method: str) -> None:
    made = pool_of(method, reward=[])
    assert learn(method)[0] == learn(method, pool=made.directory)[0]


def test_fewer_completions_are_the_first_of_the_pool(pool_of: Any, learn: Any) -> None:
    made = pool_of("slic-hf", n=9)
    read, bill = learn("slic-hf", pool=made.directory)
    assert read == learn("slic-hf")[0]
    assert bill["pool_completions"] == 72
    assert made.summary["completions"] == 108


def test_later_rounds_sample_from_the_policy(
    pool_of: Any, learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pool_of("rft")
    own, _ = learn("rft", rounds=2)
    read, bill = learn("rft", rounds=2, pool=made.directory)
    assert own == read
    assert bill["pool_completions"] == 72


def test_texts_of_the_data_are_scored_by_the_run(
    pool_of: Any, learn: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the column in the pool's data, the prompts differ, and a reward that reads columns would too.
    made = pool_of("rrhf")
    asked: list[str] = []

    def noted(text: str) -> float:
        asked.append(text)
        return float(len(text))

    monkeypatch.setattr(
        candidates, "from_column", lambda policy, prompt, name: Completion("of data", (1, 2), "eos")
    )
    monkeypatch.setattr(
        loops, "from_column", lambda policy, prompt, name: Completion("of data", (1, 2), "eos")
    )
    learn("rrhf", scored(ScriptedScorer(noted)), texts=["answer"], pool=made.directory)
    assert "of data" in asked
