"""docs/python.md: its code is type-checked and run, on a tiny model instead of the embedded one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import palate
from palate.model import source
from palate.testing import tiny_model

SRC = Path(str(palate.__file__)).parents[1]
PAGE = SRC.parent / "docs" / "python.md"

pytestmark = [
    pytest.mark.skipif(not PAGE.exists(), reason="needs the repository"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]


def program() -> str:
    """The page's blocks of Python, one after another."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    return "\n".join(blocks)


def test_the_code_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "example.py").write_text(program())
    # From the repository's root, with its configuration, so that `make check` has filled the cache.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "example.py")],
        cwd=SRC.parent,
        env={**os.environ, "MYPYPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def wide(tmp_path: Path) -> str:
    """A tiny model whose context takes the prompts of `everyday` in bytes."""
    directory = tmp_path / "wide"
    tiny_model(directory, chat=True, max_position_embeddings=1024)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 1024}))
    return str(directory)


def test_the_code_runs(
    wide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source, "embedded_model", lambda: Path(wide))
    code = program().replace("HuggingFaceTB/SmolLM2-135M-Instruct", wide)
    code = re.sub(r"steps=\d+", "steps=1, batch_size=2, max_new_tokens=8", code)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, "example.py", "exec"), names)
    shown = capsys.readouterr()
    assert (
        "unknown setting stesp; did you mean steps? `palate run oaif --help` lists the settings" in shown.out
    )
    assert "<Outcome of oaif: 1 steps, mean reward" in shown.out
    assert "step 1/1" in shown.err  # no terminal: a line per step
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"oaif", "words", "mixed", "loaded"}
    result = names["result"]
    assert isinstance(result, palate.Outcome)
    assert result.summary["steps"] == 1
