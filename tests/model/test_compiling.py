"""The choice of `--compile`, and the obstacles to compiling."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from palate.errors import ConfigError
from palate.model import compiling
from palate.model.compiling import ENOUGH_TOKENS, obstacle, settled

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _unknown_compiler() -> None:
    compiling._without_compiler.cache_clear()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which sampling on a CPU can be compiled."""
    monkeypatch.setattr(
        compiling, "obstacle", lambda device: None if device.type == "cpu" else "no GPU; use --device cpu"
    )


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("option", "device", "tokens", "before", "expected"),
    [
        ("off", CPU, ENOUGH_TOKENS, None, "off"),
        ("off", CPU, ENOUGH_TOKENS, "on", "off"),
        ("on", CPU, 1, None, "on"),
        ("on", CPU, 1, "off", "on"),
        ("auto", CPU, ENOUGH_TOKENS, None, "on"),
        ("auto", CPU, ENOUGH_TOKENS - 1, None, "off"),
        ("auto", GPU, ENOUGH_TOKENS, None, "off"),
        ("auto", CPU, ENOUGH_TOKENS, "off", "off"),
        ("auto", CPU, 1, "on", "on"),
        ("auto", CPU, None, None, "on"),
        ("auto", GPU, None, None, "off"),
    ],
)
def test_the_choice(
    option: Literal["off", "auto", "on"],
    device: torch.device,
    tokens: int | None,
    before: str | None,
    expected: str,
) -> None:
    assert settled(option, device, tokens, before=before) == expected


def test_an_obstacle_is_an_error_only_if_the_option_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device: "nothing works here; repair it")
    assert settled("auto", CPU, ENOUGH_TOKENS) == "off"
    assert settled("auto", CPU, ENOUGH_TOKENS, before="on") == "off"
    with pytest.raises(ConfigError, match=r"^compile is on, but nothing works here; repair it; or leave"):
        settled("on", CPU, 1)


def test_a_gpu_and_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    assert obstacle(GPU) == ("the model is on cuda:0, and only work on a CPU is compiled; use --device cpu")

    def missing() -> str:
        raise RuntimeError

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    monkeypatch.setenv("CXX", "c+++")
    assert obstacle(CPU) == (
        "torch finds no C++ compiler (c+++); install one, or name it in the environment variable CXX"
    )


def test_a_directory_of_compiled_code_that_is_not_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "code"))
    assert compiling._without_cache() is None
    (tmp_path / "code").chmod(0o777)
    assert "others may write into torch's directory of compiled code" in str(compiling._without_cache())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "code"))
    (tmp_path / "file").write_text("")
    assert "name another directory in the environment variable TORCHINDUCTOR_CACHE_DIR" in str(
        compiling._without_cache()
    )
