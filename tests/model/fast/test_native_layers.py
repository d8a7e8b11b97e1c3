"""Learning with compiled functions against the plain way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.config import ModelConfig
from palate.learn import Pairwise
from palate.losses import PAIR_LOSSES
from palate.model import LoadedModel, load_model
from palate.model.compiling import obstacle
from palate.model.fast import head, native_head
from palate.model.fast.attention import Attention
from palate.model.fast.layout import PackedLayout
from palate.model.fast.maps import Map
from palate.model.fast.native import Kind, Library
from palate.model.fast.native_layers import NativeOperations
from palate.model.fast.operations import Operations, mlp, rotated
from palate.model.fast.segments import Segments
from palate.testing import tiny_model, tiny_policy
from palate.types import Group, Pair, Prompt

pytestmark = pytest.mark.skipif(
    obstacle(torch.device("cpu")) is not None, reason=f"{obstacle(torch.device('cpu'))}"
)

RECORDS = (
    (5, (4, 1)),
    (1, (3,)),
    (30, (2, 12)),
    (18, ()),
    (3, (40, 17, 16)),
    (70, (130, 1)),
    (0, (5,)),
    (4, (0, 2)),
)
"""A packed row: prompts alone, single tokens, and less and more than blocks of 16 and of 64 tokens."""


def loaded(directory: Path, kind: str, head: Any = "lm", **options: Any) -> LoadedModel:
    own = {name: options.pop(name) for name in ("lora", "checkpointing") if name in options}
    source = tiny_model(directory, kind=kind, initializer_range=0.2, **options)
    cfg = {"model": source, "dtype": "float32", "device": "cpu", "lora": False, **own}
    model = load_model(ModelConfig.model_validate(cfg), head=head)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.trained():
            if "lora_B" in name or name.endswith("bias") or "score" in name:
                parameter.normal_(0, 0.3)
    return model


def groups(model: LoadedModel) -> list[Group]:
    texts = [("a", "bcd"), ("efghijk",), ("lm", "nopqr", "s" * 40)]
    prompts = [Prompt("hi"), Prompt("a longer question, with more than a block"), Prompt("so")]
    return [
        Group(prompt, tuple(model.codec.completion(prompt, text) for text in own))
        for prompt, own in zip(prompts, texts, strict=True)
    ]


def numbers(model: LoadedModel, head: str, *, statistics: bool, top: int) -> list[Tensor]:
    """What the model computes for the groups, and its gradients."""
    network = model.network
    network.train(model.network.training or network.base_model.layers[0].gradient_checkpointing)
    network.zero_grad()
    records = groups(model)
    with model.computing():
        if head == "lm":
            outputs = model.outputs(records, statistics=statistics, top_logits=top)
            parts = [outputs.logps.values]
            parts += [outputs.entropy.values, outputs.top1.values] if statistics else []
            parts += [outputs.target_logits.values, outputs.top_logits] if top else []
        elif head == "scalar":
            parts = [model.scores(records).scores]
        else:
            parts = [model.values(records).values.values]
        total = sum(
            (part * torch.linspace(-1, 2, part.numel()).view(part.shape)).sum()
            for part in parts
            if part.requires_grad
        )
        total.backward()
    gradients = [p.grad for _, p in model.trained() if p.grad is not None]
    assert len(gradients) > 5
    return [*(part.detach() for part in parts), *gradients]


@pytest.mark.parametrize(
    ("kind", "head", "options"),
    [
        ("llama", "lm", {}),
        ("llama", "lm", {"lora": True, "attention_bias": True}),
        ("llama", "lm", {"tie_word_embeddings": True, "checkpointing": True}),
        ("mistral", "lm", {"sliding_window": 7}),
        ("qwen2", "scalar", {}),
        ("qwen3", "value", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
        ("llama", "lm", {"hidden_size": 36, "intermediate_size": 50, "head_dim": 6}),
    ],
    ids=["full", "lora", "checkpointing", "window", "scores", "values", "odd sizes"],
)
@pytest.mark.parametrize("top", [0, 3])
def test_numbers_and_gradients_are_those_of_the_plain_way(
    kind: str, head: Any, options: dict[str, Any], top: int, tmp_path: Path
) -> None:
    model = loaded(tmp_path, kind, head, **options)
    plain = numbers(model, head, statistics=True, top=top)
    native = numbers(replace(model, compiles="on"), head, statistics=True, top=top)
    for ours, theirs in zip(native, plain, strict=True):
        scale = max(float(theirs.abs().max()), 1e-3)
        torch.testing.assert_close(ours / scale, theirs / scale, atol=2e-5, rtol=0)


def attended(query: Tensor, key: Tensor, value: Tensor, how: Attention, library: Library | None) -> Tensor:
    turns = torch.arange(query.shape[1])[:, None] * torch.linspace(0.1, 1.0, query.shape[-1] // 2)
    cos, sin = (torch.cat([part, part], -1)[None, :, None] for part in (turns.cos(), turns.sin()))
    if library is None:
        query, key = (rotated(Operations(), part, cos.double(), sin.double()) for part in (query, key))
        return Segments(list(RECORDS)).attend(*(part.transpose(1, 2) for part in (query, key, value)), how)
    operations = NativeOperations(library)
    angles = operations.angles(cos, sin)
    return operations.attend(PackedLayout(RECORDS), 0, query, key, value, how, angles)


@pytest.mark.parametrize("window", [None, 3, 20, 90, 2**31 - 1])
@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 20), (3, 1, 130), (6, 2, 64), (8, 1, 32), (2, 2, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_that_of_float64(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    query_heads, key_heads, size = heads
    library = Library(Kind(dtype, query_heads, key_heads, size))
    source, how = torch.Generator().manual_seed(0), Attention(0.3, window, None)
    length = sum(prompt + sum(rest) for prompt, rest in RECORDS)
    inputs = [
        torch.randn(1, length, count, size, generator=source).to(dtype)
        for count in (query_heads, key_heads, key_heads)
    ]
    slope = torch.randn(1, length, query_heads, size, generator=source).to(dtype)
    results = []
    for exact in (True, False):
        parts = [(part.double() if exact else part.clone()).requires_grad_() for part in inputs]
        out = attended(*parts, how, None if exact else library)
        results.append([out.detach(), *torch.autograd.grad(out, parts, slope.to(out.dtype))])
    close = 2e-6 if dtype == torch.float32 else 0.01
    for exact, ours in zip(*results, strict=True):
        assert (ours.double() - exact).norm() < close * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [20, 32])
def test_gradients_of_weights(size: int, dtype: torch.dtype) -> None:
    """Sizes that are and are not whole panels, more panels than are in memory at a time, and no tokens."""
    operations = NativeOperations(Library(Kind(dtype, 2, 1, size)))
    source = torch.Generator().manual_seed(0)
    for tokens, outputs, inputs in (
        *((70, 37, 20), (1, 5, 20), (0, 32, 32), (1, 32, 32), (64, 96, 32), (225, 64, 160)),
        *((449, 32, 2048 + 96), (33, 2048 + 32, 64), (31, 64, 4096 + 32)),
    ):
        slope, x = (torch.randn(tokens, n, generator=source).to(dtype) for n in (outputs, inputs))
        exact = slope.double().t() @ x.double()
        ours = operations.weight_gradient(slope, x)
        assert (ours.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(96,), (64, 32, 32), (32, 32), (2048, 96), (64, 40), ()])
def test_gradients_of_several_weights_are_those_of_each(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs that are together more and fewer than the inputs, and of which one is no whole panel."""
    operations = NativeOperations(Library(Kind(dtype, 2, 1, 32)))
    source = torch.Generator().manual_seed(0)
    x = torch.randn(100, 96, generator=source).to(dtype)
    slopes = [torch.randn(100, size, generator=source).to(dtype) for size in sizes]
    together = operations.weight_gradients(slopes, x)
    assert len(together) == len(slopes)
    for gradient, slope in zip(together, slopes, strict=True):
        exact = slope.double().t() @ x.double()
        assert gradient.shape == exact.shape
        assert (gradient.double() - exact).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * exact.norm()


def test_a_second_backward_with_overwritten_values_is_an_error() -> None:
    operations = NativeOperations(Library(Kind(torch.float32, 2, 1, 32)))
    maps = [Map(torch.randn(*shape).requires_grad_(), None) for shape in ((20, 8), (20, 8), (8, 20))]
    norm = SimpleNamespace(weight=torch.ones(8), variance_epsilon=1e-3)
    _, out = mlp(operations, torch.randn(3, 8), None, norm, maps)
    out.sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_a_head_does_not_depend_on_its_tiles(
    trained: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(Kind(dtype, 2, 1, 32))
    source = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(size, 24, generator=source).to(dtype) for size in (29, 300))
    targets, slope = torch.randint(300, (29,), generator=source), torch.randn(29, generator=source)

    def numbers(*, between: bool = False) -> list[Tensor]:
        start, map_ = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        values = native_head.native_values(start, map_, targets, library, statistics=True)
        if between:
            native_head.native_values(hidden.flip(0), weight, targets, library, statistics=False)
        gradients = torch.autograd.grad((values.logps * slope).sum(), (start, map_)[: 1 + trained])
        return [values.logps.detach(), values.entropy, *gradients]

    with torch.inference_mode():  # what is kept from here serves to learn later
        native_head.native_values(hidden, weight, targets, library, statistics=True)
    whole = numbers()
    for ours, theirs in zip(numbers(between=True), whole, strict=True):  # the logits are computed again
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(native_head, "TILE", 7 * 300)
    monkeypatch.setattr(native_head, "PART", 3 * 300)
    for module in (native_head, head):
        monkeypatch.setattr(module, "MOST_SLOPES", 11 * 300)
    for ours, theirs in zip(numbers(), whole, strict=True):
        assert (ours - theirs).norm() <= (1e-6 if dtype == torch.float32 else 0.01) * theirs.norm()


def test_a_head_of_another_thread_does_not_read_these_logits() -> None:
    library = Library(Kind(torch.bfloat16, 2, 1, 32))
    source = torch.Generator().manual_seed(0)
    hidden, other, weight = (torch.randn(n, 24, generator=source).bfloat16() for n in (29, 29, 300))
    targets = torch.randint(300, (29,), generator=source)
    start, map_ = hidden.requires_grad_(), weight.requires_grad_()

    def logps(hidden: Tensor) -> Tensor:
        return native_head.native_values(hidden, map_, targets, library, statistics=False).logps

    expected = torch.autograd.grad(logps(start).sum(), (start, map_))
    library = Library(Kind(torch.bfloat16, 2, 1, 32))
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(logps, start).result()
    logps(other)
    for ours, one in zip(torch.autograd.grad(theirs.sum(), (start, map_)), expected, strict=True):
        assert torch.equal(ours, one)


def test_results_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    model = replace(loaded(tmp_path, "llama"), compiles="on")
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(numbers(model, "lm", statistics=True, top=0))
    finally:
        torch.set_num_threads(threads)
    for one, other in zip(*results, strict=True):
        # Products of torch may differ; what is compiled does not.
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_an_update_learns_as_the_plain_way(tmp_path: Path) -> None:
    source = tiny_model(tmp_path, initializer_range=0.2)
    results = []
    for compiles in ("off", "on"):
        policy = tiny_policy(Path(source), lora=False, compile=compiles)
        objective = Pairwise(PAIR_LOSSES["dpo"], 0.1, policy.snapshot())
        assert objective is not None
        prompt = Prompt("Which one?")
        chosen, rejected = (policy.model.codec.completion(prompt, text) for text in ("this one", "that"))
        pair = Pair(prompt, chosen, rejected)
        results.append([policy.update([pair], objective)["loss"] for _ in range(4)])
    assert results[1] == pytest.approx(results[0], rel=1e-3)
    assert results[1][-1] < results[1][0]
