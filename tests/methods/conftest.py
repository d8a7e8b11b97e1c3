"""A base model that can be taught in seconds, and the rows and weights that a run leaves."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from palate.annotate import Annotator, scored
from palate.config import Sampling
from palate.learn import Policy
from palate.methods import METHODS
from palate.run import Run
from palate.testing import ScriptedScorer, tiny_model
from palate.types import Comparison, Example, Prompt

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with wide random weights: one of the usual narrow ones gives nearly uniform tokens, which
    an adapter on the layers alone can hardly change.
    """
    return tiny_model(tmp_path_factory.mktemp("base"), initializer_range=0.2)


def rows_of(run: Run) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(line) for line in Path(run.directory / "metrics.jsonl").read_text().splitlines()]


def weights_of(policy: Policy) -> Weights:
    """A copy of every weight, an adapter's too."""
    return {name: tensor.detach().clone() for name, tensor in policy.model.network.state_dict().items()}


def same(one: Weights, other: Weights) -> bool:
    """Whether all weights are bitwise the same."""
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def rows() -> Any:
    return rows_of


@pytest.fixture
def weights() -> Any:
    return weights_of


@pytest.fixture
def equal() -> Any:
    return same


def comparisons(count: int, seed: int) -> list[Comparison]:
    """Pairs in which capitals are the better answer, on any subject and at any length."""
    draw = random.Random(seed)

    def word(letters: str) -> str:
        return "".join(draw.choice(letters) for _ in range(draw.randint(4, 16)))

    return [
        Comparison(Prompt(f"{seed}.{i}?"), word("ABCDEFGHIJKLM"), word("nopqrstuvwxyz")) for i in range(count)
    ]


@pytest.fixture
def fitted(base: str, tmp_path: Path) -> Callable[..., tuple[list[dict[str, Any]], Policy]]:
    """Run an offline method on such pairs, or on their better halves; the rows of metrics and the policy."""

    def go(
        method: str, *, pairs: int = 64, held_out: int = 40, **options: Any
    ) -> tuple[list[dict[str, Any]], Policy]:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        defaults = {"steps": 20, "batch_size": 8, "lora": False, "lr": 3e-3}
        fixed = {"model": base, "data": "-", "output": output, "dtype": "float32", "device": "cpu"}
        chosen = METHODS[method]
        cfg: Any = chosen.configure(defaults | fixed | options)
        with Run(cfg, method=method) as run:
            policy = Policy.load(cfg, total_steps=cfg.total_steps(pairs), seed=run.seed("adapter"))
            learnt, unseen = (
                [policy.model.codec.pair(row) for row in comparisons(n, seed)]
                for n, seed in ((pairs, 1), (held_out, 2))
            )
            if chosen.learns_from == "demonstrations":
                shown, unseen_too = ([Example(p.prompt, p.chosen) for p in part] for part in (learnt, unseen))
                chosen.train(policy, shown, cfg, run, held_out=unseen_too)
            else:
                chosen.way_of(cfg).train(policy, learnt, cfg, run, held_out=unseen)
        return rows_of(run), policy

    return go


WANTED = frozenset(string.ascii_letters + string.digits)


def share(text: str) -> float:
    """Share of letters and digits: a quarter of what the untrained model says."""
    return sum(c in WANTED for c in text) / max(1, len(text))


@dataclass
class Taught:
    """What came of a method on its own samples."""

    rows: list[dict[str, Any]]
    policy: Policy
    rise: float
    """Of the mean share of letters in fresh samples, over what the untrained policy gave."""


@pytest.fixture
def taught(base: str, tmp_path: Path) -> Callable[..., Taught]:
    """Run a method on its own samples of 16 prompts, by default rewarded for letters and digits."""

    def go(
        method: str, annotate: Annotator | None = None, prompts: Sequence[Prompt] = (), **options: Any
    ) -> Taught:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        defaults = {"steps": 3, "batch_size": 8, "max_new_tokens": 8, "lora": False, "lr": 3e-3}
        fixed = {"model": base, "data": "-", "output": output, "dtype": "float32", "device": "cpu"}
        cfg: Any = METHODS[method].configure(defaults | fixed | options)
        prompts = prompts or [Prompt(f"q{i}") for i in range(16)]
        with Run(cfg, method=method) as run:
            policy = Policy.load(cfg, total_steps=1, seed=run.seed("adapter"))

            def said() -> float:
                groups = policy.snapshot().sample(prompts, 32, Sampling(max_new_tokens=8), seed=99)
                return fmean(share(c.text) for group in groups for c in group.completions)

            before = said()
            METHODS[method].way_of(cfg).train(
                policy, annotate or scored(ScriptedScorer(share)), prompts, cfg, run
            )
            return Taught(rows_of(run), policy, said() - before)

    return go
