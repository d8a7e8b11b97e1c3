"""A run keeps its choice of compiled functions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from palate.config import RunConfig
from palate.errors import ConfigError
from palate.model import compiling
from palate.model.compiling import ENOUGH_TOKENS
from palate.run import Display, Run, settle_compiling
from palate.run import compiling as of_run
from palate.world import Alone

CPU = torch.device("cpu")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The obstacle to compiling on this machine, which a test may change."""
    found: dict[str, str | None] = {"obstacle": None}
    for module in (compiling, of_run):
        monkeypatch.setattr(module, "obstacle", lambda device: found["obstacle"])
    return found


def choice(
    directory: Path,
    option: Literal["off", "auto", "on"],
    tokens: int = ENOUGH_TOKENS,
    word: str = "compile",
) -> tuple[str, list[str]]:
    """The choice of one start, and the lines that it shows with a word."""
    said: list[str] = []
    display = Display(quiet=True)
    display.say = said.append  # type: ignore[method-assign]
    with Run(RunConfig(output=directory), method="toy", display=display) as run:
        chosen = settle_compiling(run, option, CPU, tokens)
        list(run.steps(0))
    return chosen, [line for line in said if word in line]


def test_auto_repeats_its_first_choice(tmp_path: Path, machine: dict[str, Any]) -> None:
    assert choice(tmp_path / "long", "auto") == ("on", [])
    assert choice(tmp_path / "long", "auto", tokens=1) == ("on", [])
    assert choice(tmp_path / "short", "auto", tokens=1) == ("off", [])
    assert choice(tmp_path / "short", "auto") == ("off", [])


@pytest.mark.parametrize("option", ["off", "auto", "on"])
def test_the_wait_for_the_compiler_is_announced(
    option: Literal["off", "auto", "on"], tmp_path: Path, machine: dict[str, Any]
) -> None:
    chosen, said = choice(tmp_path, option, word="a few seconds")
    assert len(said) == (chosen == "on")


def test_a_machine_without_a_compiler(tmp_path: Path, machine: dict[str, Any]) -> None:
    choice(tmp_path / "run", "auto")
    machine["obstacle"] = "no compiler; install one"
    chosen, said = choice(tmp_path / "run", "auto")
    assert chosen == "off"
    assert said == [
        "the run started with compiled functions, but no compiler; install one; this start computes without "
        "them, so results will not be bit-identical"
    ]
    machine["obstacle"] = None
    assert choice(tmp_path / "run", "auto") == ("on", [])


def test_on_is_an_error_without_a_compiler_and_off_stays_off(tmp_path: Path, machine: dict[str, Any]) -> None:
    assert choice(tmp_path / "run", "on") == ("on", [])
    machine["obstacle"] = "no compiler; install one"
    with pytest.raises(ConfigError, match="compile is on, but no compiler"):
        choice(tmp_path / "run", "on")
    assert choice(tmp_path / "run", "off") == ("off", [])


def test_all_processes_make_the_same_choice(
    tmp_path: Path, machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choice(tmp_path / "run", "auto") == ("on", [])
    monkeypatch.setattr(Alone, "gather", lambda world, name, value: [value, "off"])
    chosen, (line,) = choice(tmp_path / "run", "auto")
    assert chosen == "off"
    assert "but another process cannot compile; this start computes without them" in line
