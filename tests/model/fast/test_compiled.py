"""Compiled steps against plain ones. Most tests trace the function only: a C++ compiler takes long."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.config import ModelConfig, Sampling
from palate.learn import Policy
from palate.model import LoadedModel, compiling, load_model
from palate.model.compiling import obstacle, say_plain
from palate.model.fast import compiled
from palate.model.fast.fused import Fused
from palate.model.rollouts import sample
from palate.testing import tiny_model, tiny_policy
from palate.types import Completion, Prompt

PROMPTS = [Prompt(text) for text in ("Hello", "A longer prompt than the others", "?", "Once upon", "a b c")]
ON, OFF = ({"compile": choice, "sampling_rows": 6} for choice in ("on", "off"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    """Forget what other tests have compiled, and which sentences they have logged."""
    compiled._FUNCTIONS.clear()
    say_plain.cache_clear()
    torch._dynamo.reset()
    yield
    compiled._FUNCTIONS.clear()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch trace the function and run its graph without compiling it, with or without a compiler."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    def make(kind: str, *, lora: bool = False, dtype: str = "float32", **options: Any) -> Policy:
        directory = tmp_path_factory.mktemp("compiled")
        tiny_model(directory, kind=kind, initializer_range=0.2, **options)
        policy = tiny_policy(Path(directory), lora=lora, dtype=dtype)
        with torch.no_grad():
            for name, parameter in policy.model.trained():
                if "lora_B" in name or name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        policy.model.revision += 1
        return policy

    return make


def drawn(model: LoadedModel, options: dict[str, Any], n: int = 3, new: int = 9) -> list[Completion]:
    """Completions of prompts of several lengths in two slots, so that slots are refilled and rows finish."""
    sampling = Sampling(max_new_tokens=new, **options)
    groups = sample(model, PROMPTS, n, sampling, seed=0, version=0)
    return [completion for group in groups for completion in group.completions]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Palate has logged; torch logs its own steps."""
    return [record.getMessage() for record in caplog.records if record.name == "palate"]


def alike(ours: list[Completion], theirs: list[Completion]) -> None:
    assert [c.token_ids for c in ours] == [c.token_ids for c in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-4)


# ---- The function ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("kind", "lora", "options"),
    [
        ("llama", True, {"attention_bias": True}),
        ("qwen3", False, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
    ids=["llama", "qwen3"],
)
def test_token_for_token_in_float32(
    kind: str,
    lora: bool,
    options: dict[str, Any],
    policy_of: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = policy_of(kind, lora=lora, **options).model
    expected = drawn(model, OFF)
    with monkeypatch.context() as patch:
        # One function serves all layers and all steps: to compile a second time is an error here.
        stance = torch.compiler.set_stance
        patch.setattr(torch.compiler, "set_stance", lambda name: stance("fail_on_recompile"))
        alike(drawn(model, ON), expected)
        with torch.no_grad():
            for _, parameter in model.trained():
                parameter.mul_(1.5)
        model.revision += 1
        changed = drawn(model, ON)
        alike(changed, drawn(model, OFF))
        assert [c.token_ids for c in changed] != [c.token_ids for c in expected]
    assert said(caplog) == []
    assert len(compiled._FUNCTIONS) == 1
    with torch.inference_mode():  # its tensors are others for torch, so some steps are plain
        alike(drawn(model, ON), changed)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("n", "rows"), [(1, 3), (3, 3), (1, 1)], ids=["row", "slot", "both"])
def test_single_rows_and_slots(
    n: int, rows: int, policy_of: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    model = policy_of("llama").model
    expected = drawn(model, OFF, n)
    alike(drawn(model, ON | {"sampling_rows": rows}, n), expected)
    assert said(caplog) == []


@pytest.mark.skipif(
    "PALATE_TEST_COMPILER" not in os.environ, reason="takes half a minute; PALATE_TEST_COMPILER=1 runs it"
)
def test_compiled_by_inductor_and_again_in_another_process(
    policy_of: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    if (reason := obstacle(CPU)) is not None:
        pytest.skip(reason)
    model = policy_of("llama").model
    ours = drawn(model, ON)
    alike(ours, drawn(model, OFF))
    assert None not in compiled._FUNCTIONS.values()
    compiled._FUNCTIONS.clear()  # as a process that starts: torch finds the code in its directory
    torch._dynamo.reset()
    again = drawn(model, ON)
    assert [(c.token_ids, c.logps) for c in again] == [(c.token_ids, c.logps) for c in ours]
    assert said(caplog) == []


# ---- Falling back ----------------------------------------------------------------------------------


def broken(*function: Any, **options: Any) -> Any:
    raise OSError("fatal error: 'omp.h' file not found\nin a long report of a compiler" + 30 * " and more")


def wrong(graph: Any, inputs: Any) -> Any:
    return lambda *arguments: [part * 1.5 for part in graph(*arguments)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("broken", "'omp.h' file not found in a long"), ("wrong", "hidden states differ by")],
)
def test_a_failure_is_logged_once_and_sampling_is_plain(
    fault: str,
    reason: str,
    policy_of: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if fault == "broken":
        monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiled, "BACKEND", wrong)
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    model = policy_of("llama").model
    expected = drawn(model, OFF)
    for _ in range(2):
        assert drawn(model, ON) == expected
    (line,) = said(caplog)
    assert line.startswith("sampling falls back to its plain steps, because compiling failed: ")
    assert reason in line
    assert len(line) < 300


def test_switched_off_by_the_environment(
    policy_of: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    with torch._dynamo.config.patch(disable=True):  # monkeypatch would hide the option for good
        drawn(policy_of("llama").model, ON)
    (line,) = said(caplog)
    assert "compiling failed" in line


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_model_that_is_not_compiled_is_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    tiny_model(tmp_path, kind=kind)
    cfg = ModelConfig(model=str(tmp_path), dtype="float32", device="cpu", fast=kind != "llama")
    model = load_model(cfg, trainable=False)
    with caplog.at_level(logging.WARNING):
        drawn(model, ON)
        drawn(model, ON)
    (line,) = said(caplog)
    assert line.startswith(f"sampling is not compiled: {tmp_path}")


def test_products_of_old_weights_are_freed(policy_of: Callable[..., Policy]) -> None:
    fused = Fused(policy_of("llama").model.network)
    before = len(compiled._JOINED)
    numbers = [compiled._numbered(layer) for layer in fused.layers]
    assert len(compiled._JOINED) == before + 4 * len(numbers)
    del fused
    assert len(compiled._JOINED) == before
