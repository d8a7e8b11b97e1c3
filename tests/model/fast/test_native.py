"""Compiled steps against plain ones."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palate.config import ModelConfig, Sampling
from palate.errors import RunError
from palate.learn import Policy
from palate.model import LoadedModel, compiling, load_model
from palate.model.compiling import obstacle, say_plain
from palate.model.fast import native, native_step
from palate.model.fast.fused import Fused
from palate.model.fast.native import library_of
from palate.model.fast.native_step import NativeStep
from palate.model.rollouts import sample
from palate.model.sampling import Barred, choose
from palate.testing import tiny_model, tiny_policy
from palate.types import Completion, Group, Prompt

PROMPTS = [Prompt(text) for text in ("Hello", "A longer prompt than the others", "?", "Once upon", "a b c")]
ON, OFF = {"compile": "on"}, {"compile": "off"}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _a_process_of_its_own() -> Iterator[None]:
    """Forget what other tests have compiled, and which sentences they have logged."""
    native._LIBRARIES.clear()
    native_step._FAILED.clear()
    say_plain.cache_clear()
    yield
    native._LIBRARIES.clear()
    native_step._FAILED.clear()


@pytest.fixture
def compiler() -> None:
    if (reason := obstacle(CPU)) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def policy_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Policy]:
    def make(kind: str, *, lora: bool = False, dtype: str = "float32", **options: Any) -> Policy:
        directory = tmp_path_factory.mktemp("native")
        tiny_model(directory, kind=kind, initializer_range=0.2, **options)
        policy = tiny_policy(Path(directory), lora=lora, dtype=dtype)
        with torch.no_grad():
            for name, parameter in policy.model.trained():
                if "lora_B" in name or name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        policy.model.revision += 1
        return policy

    return make


@pytest.fixture
def step_of(compiler: None, policy_of: Callable[..., Policy]) -> Callable[[str], NativeStep]:
    def make(dtype: str) -> NativeStep:
        network = policy_of("llama", dtype=dtype).model.network
        library = library_of(network)
        assert library is not None
        return NativeStep(Fused(network), library)

    return make


def drawn(model: LoadedModel, options: dict[str, Any], n: int = 3, new: int = 9) -> list[Completion]:
    """Completions of prompts of several lengths in two slots, so that slots are refilled and rows finish."""
    given = {"max_new_tokens": new, "sampling_rows": 6, **options}
    model.compiles = given.pop("compile")
    groups = sample(model, PROMPTS, n, Sampling.model_validate(given), seed=0, version=0)
    return [completion for group in groups for completion in group.completions]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What Palate has logged; torch logs its own steps."""
    return [record.getMessage() for record in caplog.records if record.name == "palate"]


def alike(ours: list[Completion], theirs: list[Completion]) -> None:
    """Compare completions up to the first other token: a random number may fall on a boundary, but rarely."""
    differing = 0
    for one, other in zip(ours, theirs, strict=True):
        pairs = zip(one.token_ids, other.token_ids, strict=False)
        size = next((i for i, (x, y) in enumerate(pairs) if x != y), len(other.token_ids))
        differing += one.token_ids != other.token_ids
        for name in ("logps", "sampling_logps"):
            np.testing.assert_allclose(getattr(one, name)[:size], getattr(other, name)[:size], atol=1e-4)
    assert differing <= 1


# ---- Steps -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("kind", "lora", "options"),
    [
        ("llama", True, {"attention_bias": True}),
        ("mistral", False, {"sliding_window": 5}),
        ("qwen2", False, {}),
        ("qwen3", False, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", False, {"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 1}),
        ("llama", False, {"head_dim": 130, "num_attention_heads": 2, "num_key_value_heads": 2}),
        ("llama", False, {"hidden_size": 36, "intermediate_size": 50, "head_dim": 6}),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3", "one key head", "large heads", "odd sizes"],
)
def test_token_for_token_in_float32(
    kind: str,
    lora: bool,
    options: dict[str, Any],
    policy_of: Callable[..., Policy],
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.manual_seed(0)
    model = policy_of(kind, lora=lora, **options).model
    expected = drawn(model, OFF, new=40)
    alike(drawn(model, ON, new=40), expected)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.mul_(1.5)
    model.revision += 1
    changed = drawn(model, ON, new=40)
    alike(changed, drawn(model, OFF, new=40))
    assert [c.token_ids for c in changed] != [c.token_ids for c in expected]
    assert said(caplog) == []
    assert len(native._LIBRARIES) == 1
    with torch.inference_mode():
        alike(drawn(model, ON, new=40), changed)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("n", "rows"), [(1, 3), (3, 3), (1, 1), (40, 40)], ids=["row", "slot", "one", "many"]
)
def test_single_and_many_rows(
    n: int, rows: int, policy_of: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    model = policy_of("llama").model
    expected = drawn(model, OFF | {"sampling_rows": rows}, n)
    alike(drawn(model, ON | {"sampling_rows": rows}, n), expected)
    assert said(caplog) == []


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.6},
        {"temperature": 1.7, "min_new_tokens": 6},
        {"min_new_tokens": 6},
        {"temperature": 0.0},
        {"top_p": 0.8, "top_k": 30, "repetition_penalty": 1.3},
    ],
)
def test_all_options_of_sampling(options: dict[str, Any], policy_of: Callable[..., Policy]) -> None:
    model = policy_of("llama").model
    alike(drawn(model, ON | options), drawn(model, OFF | options))


@pytest.mark.usefixtures("compiler")
def test_bfloat16_is_as_exact_as_the_plain_way(
    policy_of: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    model = policy_of("llama", dtype="bfloat16").model
    exact = policy_of("llama", dtype="float32").model
    with torch.no_grad():
        for (_, ours), (_, wide) in zip(model.trained(), exact.trained(), strict=True):
            wide.copy_(ours)
    exact.revision += 1
    errors = []
    for choice in (ON, OFF):
        completions = drawn(model, choice, new=20)
        assert said(caplog) == []
        groups = [Group(prompt, tuple(completions[3 * i : 3 * i + 3])) for i, prompt in enumerate(PROMPTS)]
        with torch.no_grad(), exact.computing():
            scored = exact.outputs(groups).logps.rows()
        gaps = [np.subtract(c.logps, row.numpy()) for c, row in zip(completions, scored, strict=True)]
        errors.append(np.abs(np.concatenate(gaps)).mean())
    assert errors[0] < 1.2 * errors[1]


# ---- Draws -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_draws_equal_the_plain_ones(
    dtype: str, temperature: float, step_of: Callable[[str], NativeStep]
) -> None:
    step, source = step_of(dtype), torch.Generator().manual_seed(1)
    sampling = Sampling(temperature=temperature)
    for size in (5, 256, 1000):
        logits = (3 * torch.randn(40, size, generator=source)).to(getattr(torch, dtype))
        uniforms = torch.rand(40, dtype=torch.float64, generator=source)
        uniforms[:2] = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
        barred = Barred(torch.rand(40, generator=source) < 0.5, torch.tensor([1, 4]))
        for barring in (None, barred):
            ours = step.choose(logits, sampling, uniforms, barring)
            plain = choose(logits.float(), sampling, uniforms, barred=barring)
            same = ours[0] == plain[0]
            assert same[2:].float().mean() > 0.97  # a number may fall on a boundary, and the second does
            allowed = (
                logits.float() if barring is None else logits.masked_fill(barring.mask(logits), -torch.inf)
            )
            assert bool(allowed.gather(-1, ours[0][:, None]).isfinite().all())
            for one, other in zip(ours[1:], plain[1:], strict=True):
                torch.testing.assert_close(one[same], other[same], atol=2e-6, rtol=2e-6)


def test_draws_follow_the_distribution(step_of: Callable[[str], NativeStep]) -> None:
    step = step_of("float32")
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(2))
    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _, _ = step.choose(
        logits.expand(count, -1).contiguous(), Sampling(temperature=1.0), uniforms, None
    )
    shares = torch.bincount(tokens, minlength=300) / count
    # Evenly spaced numbers: each count is exact up to one.
    assert (shares - logits.softmax(-1)[0]).abs().max() < 1.1 / count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fault", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error(
    dtype: str, fault: float, step_of: Callable[[str], NativeStep]
) -> None:
    logits = torch.zeros(3, 300, dtype=getattr(torch, dtype))
    logits[1, 299] = fault
    uniforms = torch.full((3,), 0.5, dtype=torch.float64)
    for temperature in (1.0, 0.5):
        with pytest.raises(RunError, match="not finite"):
            step_of(dtype).choose(logits, Sampling(temperature=temperature), uniforms, None)


# ---- Falling back ----------------------------------------------------------------------------------


def broken(*arguments: Any, **options: Any) -> Any:
    raise OSError("fatal error: 'omp.h' file not found\nin a long report of a compiler" + 30 * " and more")


def wrong(name: str) -> Callable[[native.Library, native.Kind], None]:
    """A library in which one function does nothing."""
    made = native.Library.__init__

    def make(library: native.Library, kind: native.Kind) -> None:
        made(library, kind)
        setattr(library, name, lambda *arguments: 0)

    return make


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in native.SIGNATURES if name != "has_tiles"])
def test_a_wrong_function_is_found(
    name: str,
    dtype: str,
    policy_of: Callable[..., Policy],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = policy_of("llama", dtype=dtype).model
    kind = native.Kind.of(model.network)
    assert kind is not None
    if name in {"weight_gradients", "pack_weight", "few_rows"} and not native.Library(kind).has_tiles():
        pytest.skip("only bfloat16 on processors with matrix units uses it")
    expected = drawn(model, OFF)
    monkeypatch.setattr(native.Library, "__init__", wrong(name))
    assert drawn(model, ON) == expected
    (line,) = said(caplog)
    assert "compiled and plain" in line
    assert "differ" in line


def test_a_failure_is_logged_once_and_the_plain_way_is_used(
    policy_of: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native.Library, "__init__", broken)
    model = policy_of("llama").model
    expected = drawn(model, OFF)
    for _ in range(2):
        assert drawn(model, ON) == expected
    (line,) = said(caplog)
    assert line.startswith("compiled functions cannot be used, so the plain way is: ")
    assert "'omp.h' file not found in a long" in line
    assert len(line) < 300


@pytest.mark.parametrize(
    ("kind", "fast", "why"), [("gpt2", True, "kind of layers"), ("llama", False, "plain")]
)
def test_a_model_that_is_not_compiled_is_named(
    kind: str,
    fast: bool,
    why: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compiling, "obstacle", lambda device: None)
    tiny_model(tmp_path, kind=kind)
    cfg = ModelConfig(model=str(tmp_path), dtype="float32", device="cpu", fast=fast, compile="on")
    with caplog.at_level(logging.WARNING):
        model = load_model(cfg, trainable=False)
        load_model(cfg, trainable=False)
    (line,) = said(caplog)
    assert line.startswith(f"{tmp_path} is not compiled: ")
    assert why in line
    assert len(drawn(model, ON)) == 3 * len(PROMPTS)


@pytest.mark.usefixtures("compiler")
def test_the_first_use_may_be_in_inference_mode(
    policy_of: Callable[..., Policy], caplog: pytest.LogCaptureFixture
) -> None:
    model = policy_of("llama").model
    with torch.inference_mode():
        alike(drawn(model, ON), drawn(model, OFF))
    assert said(caplog) == []


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_that_changes_little_passes_the_test(
    dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model(tmp_path, kind="llama", initializer_range=0.002)
    model = load_model(
        ModelConfig.model_validate({"model": str(tmp_path), "dtype": dtype, "compile": "on"}), trainable=False
    )
    drawn(model, ON)
    assert said(caplog) == []
    assert None not in native._LIBRARIES.values()


@pytest.mark.usefixtures("compiler")
def test_an_end_token_beyond_the_vocabulary_is_never_drawn(step_of: Callable[[str], NativeStep]) -> None:
    logits, uniforms = torch.zeros(2, 300), torch.full((2,), 0.5, dtype=torch.float64)
    barred = Barred(torch.tensor([True, False]), torch.tensor([5, 9_000]))
    tokens, _, _ = step_of("float32").choose(logits, Sampling.model_validate({}), uniforms, barred)
    assert tokens.tolist() == [150, 150]
