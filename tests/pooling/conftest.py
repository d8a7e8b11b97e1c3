from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from palate.pooling import PoolConfig
from palate.settings import load_config
from palate.testing import tiny_model

Configure = Callable[..., PoolConfig]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model without a chat template, whose completions vary."""
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.fixture
def configure(model: str, tmp_path: Path) -> Configure:
    """Options of a small pool of 8 prompts with 3 completions, in four files."""

    def make(rows: Sequence[Mapping[str, Any]] | None = None, **options: Any) -> PoolConfig:
        file = tmp_path / "prompts.jsonl"
        given = [{"prompt": f"q{i}", "place": i} for i in range(8)] if rows is None else rows
        file.write_text("".join(json.dumps(row) + "\n" for row in given))
        small = {"n": 3, "max_new_tokens": 6, "shard_size": 2, "reward": ["length:2"], "seed": 1}
        fixed = {
            "data": str(file),
            "model": model,
            "dtype": "float32",
            "device": "cpu",
            "output": tmp_path / "pool",
        }
        return load_config(PoolConfig, file=None, flags={**fixed, **small, **options}, python=True)

    return make


@pytest.fixture
def functions(tmp_path: Path) -> Callable[[str], list[str]]:
    """Writes a file with a reward function `f` that notes its calls in `asked`; returns the reward."""

    def make(body: str) -> list[str]:
        code = f"def f(completions, place, **_):\n    with open({str(tmp_path / 'asked')!r}, 'a') as log:\n"
        code += "        log.write('x' * len(completions))\n" + body
        (tmp_path / "rewards.py").write_text(code)
        return [f"{tmp_path / 'rewards.py'}:f"]

    return make
