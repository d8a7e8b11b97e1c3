"""The kernel of packed rows, uncompiled as far as a CPU goes: mask, numbers, gradients, when it is used."""

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex

from palate.config import ModelConfig
from palate.model import load_model
from palate.model.fast import flex
from palate.model.fast.attention import Attention
from palate.model.fast.layout import PackedLayout, positions
from palate.model.fast.lean import states_of
from palate.testing import tiny_model

CPU = torch.device("cpu")
SHAPE = ((3, (2, 1)), (1, (2,)))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's plain form of the kernel. On a CPU it has gradients, too, but for a check that denies it."""
    monkeypatch.setattr(flex, "compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)


def visible(shape: flex.Shape, window: int | None = None) -> Tensor:
    """Which tokens see which, by the mask's function and by its blocks alike. bool (L, L)"""
    mask = flex.block_mask(shape, window, CPU)
    whole = torch_flex.create_mask(mask.mask_mod, 1, 1, *mask.seq_lengths, device="cpu")[0, 0]
    length = sum(prompt + sum(sizes) for prompt, sizes in shape)
    assert not whole[:length, length:].any()
    assert whole[length:].sum(-1).eq(1).all()
    tiles = whole.unflatten(0, (-1, flex.BLOCK)).unflatten(2, (-1, flex.BLOCK)).transpose(1, 2).flatten(2)
    some, every = tiles.any(-1), tiles.all(-1)
    partial = dense(mask.kv_num_blocks, mask.kv_indices)
    full = dense(mask.full_kv_num_blocks, mask.full_kv_indices)
    # A block that is seen whole through two ranges may count as partial: that is slower, not wrong.
    assert torch.equal(partial | full, some)
    assert not (partial & full).any()
    assert not (full & ~every).any()
    assert torch.equal(dense(mask.q_num_blocks, mask.q_indices), partial.T)
    assert torch.equal(dense(mask.full_q_num_blocks, mask.full_q_indices), full.T)
    return whole[:length, :length]


def dense(count: Tensor, indices: Tensor) -> Tensor:
    """Blocks by row and column, of the numbers that a mask keeps. bool (B, B)"""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, (many, columns) in enumerate(zip(count[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        found[row, columns[:many]] = True
    return found


def seen(shape: flex.Shape, window: int | None = None) -> list[str]:
    """Of each token what it sees, as ones and zeros."""
    return ["".join(str(int(k)) for k in row) for row in visible(shape, window)]


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


records = st.tuples(st.integers(1, 400), st.lists(st.integers(0, 200), min_size=1, max_size=3))


@settings(max_examples=25, deadline=None)
@given(st.lists(records, min_size=1, max_size=4), st.none() | st.integers(1, 50))
def test_the_mask_says_what_the_segments_see(shape: flex.Shape, window: int | None) -> None:
    length = sum(prompt + sum(sizes) for prompt, sizes in shape)
    # Where keys are all alike and each token has a value of its own, attention is the mean of what is seen.
    alike = torch.zeros(1, 1, length, length)
    value = torch.eye(length)[None, None]
    mean = flex.Segments(shape).attend(alike, alike, value, Attention(1.0, window, None))[0, :, 0]
    assert torch.equal(mean > 0, visible(shape, window))


def test_trials_have_blocks_seen_whole_whichever_kernel_they_meet() -> None:
    lengths = [sum(prompt + sum(sizes) for prompt, sizes in shape) for shape in flex.TRIALS]
    assert len({flex._filled(length) for length in lengths[:2]}) == 2
    assert any(length % flex.BLOCK == 0 for length in lengths)
    assert flex.block_mask(flex.TRIALS[1], None, CPU).full_kv_num_blocks.sum() > 0


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
    assert sum(1 + len(sizes) for _, sizes in shape) >= flex.FEW_SEGMENTS
    ids = torch.randint(256, (1, 58), generator=torch.Generator().manual_seed(0))

    def gradients() -> list[Tensor]:
        with model.computing():
            hidden = states_of(model.network)(ids, positions(shape), PackedLayout(shape))
            weights = [p for p in model.network.parameters() if p.requires_grad]
            found = torch.autograd.grad(hidden.pow(3).sum(), weights, allow_unused=True)
        return [hidden, *(gradient for gradient in found if gradient is not None)]

    plain = gradients()
    monkeypatch.setattr("palate.model.fast.layout.trusted", lambda query, key, how: True)
    used = []
    attend = flex.Blocks.attend
    monkeypatch.setattr(flex.Blocks, "attend", lambda self, *given: used.append(1) or attend(self, *given))
    found = gradients()
    assert len(used) == 2  # layers
    # Gradients reach thousands, and a small element is the sum of large ones: the rounding of each element
    # follows the norm of the whole tensor. Against float64, either path is off by about 8 eps of it.
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 100 * torch.finfo(torch.float32).eps * theirs.norm()


@pytest.mark.usefixtures("uncompiled")
def test_traced_for_one_length_and_then_for_any(monkeypatch: pytest.MonkeyPatch) -> None:
    # As it is compiled for a GPU, but for the code that is made in the end.
    traced = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(flex, "compiled", lambda: traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs = []
    layers = (
        Attention(0.3, None, None),
        Attention(0.3, 9, None),
        Attention(0.3, 40, 5.0),
        Attention(0.4, 9, 9.0),
    )
    for how in layers:
        for shape in (*flex.TRIALS, ((262, (40, 17)), (5, (60,))), ((646, (40, 17)), (5, (60,)))):
            assert flex._distance(shape, CPU, torch.float32, 6, 2, 16, how) < 1e-5
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # With gradient and without, for one length and for any; a window is no other kernel, a soft cap is one,
    # and by then it is known that lengths change.
    assert graphs == [4, 4, 6, 8]


# ---- when it is used -------------------------------------------------------------------------------


def tried(scaling: float) -> bool:
    """A trial on the CPU; each of the tests has a scaling of its own, as what was tried is remembered."""
    return flex._tried(CPU, torch.float32, 4, 2, 16, scaling, None)


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


def test_what_is_no_number_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    distances = iter([0.001, float("nan"), 0.001, 0.001])
    monkeypatch.setattr(flex, "_distance", lambda *given: next(distances))
    assert not tried(0.34)
    assert "off by nan" in caplog.text


@pytest.mark.usefixtures("uncompiled")
def test_a_trial_within_a_checkpoint_leaves_it_alone() -> None:
    x = torch.ones(3, requires_grad=True)
    passes = []

    def layer(given: Tensor) -> Tensor:
        passes.append(tried(0.36))
        return given.exp().sin()

    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert passes == [True, True]
    torch.testing.assert_close(x.grad, torch.ones(3).exp().cos() * torch.ones(3).exp())


def test_prompts_alone_and_few_segments_go_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*given: object) -> bool:
        raise AssertionError

    monkeypatch.setattr("palate.model.fast.layout.trusted", never)
    for shape in ([(2, ())] * flex.FEW_SEGMENTS, [(2, (1, 1))]):
        length = sum(prompt + sum(sizes) for prompt, sizes in shape)
        given = torch.ones(1, 1, length, 4)
        PackedLayout(shape).attend(0, given, given, given, Attention(1.0, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_goes_from_segment_to_segment(dtype: torch.dtype) -> None:
    query = torch.zeros(1, 4, 9, 16, dtype=dtype)
    assert not flex.trusted(query, query, Attention(0.25, None, None))


@pytest.mark.parametrize("value", [None, "0", "yes"])
def test_it_is_off_unless_it_is_switched_on(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(flex.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(flex.SWITCH, value)
    monkeypatch.setattr(flex, "_tried", lambda *given: True)
    query = torch.zeros(1, 4, 9, 16, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert not flex.trusted(query, query, Attention(0.25, None, None))
    monkeypatch.setenv(flex.SWITCH, "1")
    assert flex.trusted(query, query, Attention(0.25, None, None))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, for which the kernel is compiled")
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("size", [64, 128])
def test_on_a_gpu_it_is_trusted(
    size: int, window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(flex.SWITCH, "1")
    how = Attention(size**-0.5, window, softcap)
    shape = [(500, (70, 64, 200)), (1, (1,)), (900, (200, 200))] * 2
    length = sum(prompt + sum(sizes) for prompt, sizes in shape)
    query, key, value = (
        torch.randn(1, heads, length, size, dtype=torch.bfloat16, device="cuda") for heads in (9, 3, 3)
    )
    assert flex.trusted(query, key, how)
    ours, theirs = (way(shape).attend(query, key, value, how) for way in (flex.Blocks, flex.Segments))
    assert float((ours - theirs).norm() / theirs.norm()) < flex.CLOSE
