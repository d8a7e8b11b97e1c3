"""The kernel of packed rows, uncompiled as far as a CPU goes: mask, numbers, gradients, when it is used."""

import logging
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from palate.config import ModelConfig
from palate.model import flex, load_model
from palate.model.attention import Attention
from palate.model.layout import PackedLayout, positions
from palate.model.lean import states_of
from palate.model.paths import computing
from palate.testing import tiny_model

CPU = torch.device("cpu")
SHAPE = ((3, (2, 1)), (1, (2,)))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's plain form of the kernel. On a CPU it has gradients, too, but for a check that denies it."""
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def seen(shape: flex.Shape, window: int | None = None) -> list[str]:
    """Of each token what it sees, as ones and zeros; without the tokens that fill a block."""
    mask = flex.block_mask(shape, window, CPU)
    whole = torch_flex.create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    length = sum(prompt + sum(sizes) for prompt, sizes in shape)
    assert not whole[:length, length:].any()
    assert whole[length:].sum(-1).eq(1).all()
    return ["".join(str(int(k)) for k in row) for row in whole[:length, :length]]


def test_mask_by_hand() -> None:
    # prompt of 3 with completions of 2 and 1, then a prompt of 1 with one of 2
    assert seen(SHAPE) == [
        "100000000",
        "110000000",
        "111000000",
        "111100000",
        "111110000",
        "111001000",
        "000000100",
        "000000110",
        "000000111",
    ]


def test_mask_of_a_window_by_hand() -> None:
    # Positions are 0 1 2 | 3 4 | 3, and 0 | 1 2; a window of 2 is the token itself and the one before.
    assert seen(SHAPE, window=2) == [
        "100000000",
        "110000000",
        "011000000",
        "001100000",
        "000110000",
        "001001000",
        "000000100",
        "000000110",
        "000000011",
    ]


records = st.tuples(st.integers(1, 90), st.lists(st.integers(0, 60), min_size=1, max_size=3))


@settings(max_examples=25, deadline=None)
@given(st.lists(records, min_size=1, max_size=4), st.none() | st.integers(1, 50))
def test_the_mask_says_what_the_segments_see(shape: flex.Shape, window: int | None) -> None:
    mask = flex.block_mask(shape, window, CPU)
    length = sum(prompt + sum(sizes) for prompt, sizes in shape)
    # Where keys are all alike and each token has a value of its own, attention is the mean of what is seen.
    alike = torch.zeros(1, 1, length, length)
    value = torch.eye(length)[None, None]
    mean = flex.Segments(shape).attend(alike, alike, value, Attention(1.0, window, None))[0, :, 0]
    whole = torch_flex.create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    assert torch.equal(mean > 0, whole[:length, :length])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7, 170])
def test_numbers_and_gradients_are_the_segments(
    heads: int, kv_heads: int, softcap: float | None, window: int | None
) -> None:
    how = Attention(0.3, window, softcap)
    for shape in flex.TRIALS:
        assert flex._distance(shape, CPU, torch.float32, heads, kv_heads, 16, how) < 1e-5


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mistral"])
def test_a_model_computes_the_same_states_through_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model(tmp_path, kind=kind, initializer_range=0.1)
    model = load_model(ModelConfig(model=str(tmp_path), dtype="float32", device="cpu", lora_rank=4))
    shape = ((5, (4, 1)), (1, (3,)), (30, (2, 12)))
    ids = torch.randint(256, (1, 58), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        with computing(model):
            hidden = states_of(model.network)(ids, positions(shape), PackedLayout(shape))
            weights = [p for p in model.network.parameters() if p.requires_grad]
            found = torch.autograd.grad(hidden.pow(3).sum(), weights, allow_unused=True)
        return [hidden, *(gradient for gradient in found if gradient is not None)]

    plain = gradients()
    monkeypatch.setattr("palate.model.layout.trusted", lambda query, key, how: True)
    for ours, theirs in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


CAN_COMPILE = bool(shutil.which("g++")) and Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(not CAN_COMPILE, reason="needs g++ and Python's headers to compile the kernel for a CPU")
@torch.no_grad()
def test_compiled_for_one_length_and_then_for_any() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for prompt, window in ((300, None), (700, None), (20, 9), (150, 40), (400, None)):
        shape = ((prompt, (40, 17)), (5, (60,)))
        draw = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, h, prompt + 122, 16, generator=draw) for h in (6, 2, 2))
        how = Attention(0.3, window, None)
        torch.testing.assert_close(
            flex.Blocks(shape).attend(query, key, value, how),
            flex.Segments(shape).attend(query, key, value, how),
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


# ---- when it is used -------------------------------------------------------------------------------


def tried(scaling: float) -> bool:
    """A trial on the CPU; each of the tests has a scaling of its own, as what was tried is remembered."""
    return flex._tried(CPU, torch.float32, 4, 2, 16, scaling, None, None)


@pytest.mark.usefixtures("uncompiled")
def test_what_agrees_is_trusted() -> None:
    assert tried(0.31)


@pytest.mark.usefixtures("uncompiled")
def test_what_is_off_is_not_trusted_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forgets_the_scale(*given: Tensor, **how: object) -> Tensor:
        return torch_flex.flex_attention(*given, **how | {"scale": None})

    monkeypatch.setattr(flex, "compiled", lambda: forgets_the_scale)
    with caplog.at_level(logging.WARNING, "palate"):
        assert not tried(0.9)
        assert not tried(0.9)
    assert len(caplog.messages) == 1
    assert "off by" in caplog.text


def test_what_does_not_compile_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(*given: Tensor, **how: object) -> Tensor:
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(flex, "compiled", lambda: no_compiler)
    assert not tried(0.33)
    assert "no compiler found" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_goes_from_segment_to_segment(dtype: torch.dtype) -> None:
    query = torch.zeros(1, 4, 9, 16, dtype=dtype)
    assert not flex.trusted(query, query, Attention(0.25, None, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for which the kernel is compiled")
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu_it_is_trusted(size: int, window: int | None, softcap: float | None) -> None:
    query, key = (torch.zeros(1, heads, 9, size, dtype=torch.bfloat16, device="cuda") for heads in (9, 3))
    assert flex.trusted(query, key, Attention(size**-0.5, window, softcap))
