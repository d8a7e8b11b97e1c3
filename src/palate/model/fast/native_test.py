"""The test of compiled functions: a layer, the head and sampling steps of a model, against the plain way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from palate.config import Sampling
from palate.model.fast.attention import following
from palate.model.fast.decode import KeyValueStore
from palate.model.fast.fused import Layer
from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, positions
from palate.model.fast.lean import WINDOW, kind_of, layer_states
from palate.model.fast.native import Library
from palate.model.fast.native_head import native_values
from palate.model.fast.native_layers import NativeOperations
from palate.model.fast.native_passes import NativePasses
from palate.model.fast.native_products import FewRows
from palate.model.fast.native_step import BlockStore, Rows, in_pairs, native_choice
from palate.model.fast.operations import Operations, normed_products
from palate.model.passes import Passes
from palate.model.sampling import Barred, choose

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of native and plain results beside rounding, relative to what a layer changes."""
RECORDS = ((5, (4, 19)), (40, (3,)), (1, (2, 2)))
"""The packed row of the test: less and more than a block of keys."""


def test(library: Library, network: Any) -> None:
    """Compare the functions with the plain way, on the network's first layer.

    Raises:
        RuntimeError: the results differ.
    """
    with torch.inference_mode(False), torch.enable_grad():
        _test_layer(library, network)
        _test_norm(library)
        _test_passes(library)
        if library.has_tiles():
            _test_weight_gradient(library)
            _test_few_rows(library)
        for trained in (True, False):
            _test_head(library, trained)


def test_steps(library: Library, layer: Layer) -> None:
    """Compare sampling steps of a layer, and the draw of tokens.

    Raises:
        RuntimeError: the results differ.
    """
    with torch.inference_mode(False), torch.no_grad():
        _test_steps(library, layer)
        _test_draws(library)


def _compare(what: str, ours: Tensor, expected: Tensor, change: float) -> None:
    """Raise an error if results differ by more than rounding. change: the norm of what was computed."""
    gap = float((ours.float() - expected.float()).norm())
    rounding = torch.finfo(expected.dtype).eps * float(expected.float().norm())
    if not gap <= CLOSE[expected.dtype] * change + rounding:
        raise RuntimeError(f"compiled and plain {what} differ by {gap / max(change, 1e-30):.1%}")


def _test_layer(library: Library, network: Any) -> None:
    """Compare the hidden states and the gradient of a layer."""
    kind = kind_of(network)
    assert kind is not None
    model = network.base_model
    layer = model.layers[0]
    source = torch.Generator().manual_seed(0)
    places = positions(RECORDS)
    hidden = torch.randn(places.numel(), network.config.hidden_size, generator=source).to(network.dtype)
    slope = torch.randn(hidden.shape, generator=source).to(network.dtype)
    cos, sin = (part.unsqueeze(2) for part in model.rotary_emb(hidden[None], places))
    results: list[list[Tensor]] = []
    for operations in (Operations(), NativeOperations(library)):
        start = hidden.clone().requires_grad_()
        with following(network):
            states, change = layer_states(
                layer,
                WINDOW[kind](layer.self_attn),
                linear,
                operations,
                start,
                None,
                angles=operations.angles(cos, sin),
                layout=PackedLayout(RECORDS),
            )
        states = states + change
        (gradient,) = torch.autograd.grad(states, start, slope)
        results.append([states.detach(), gradient])
    names, before = ("hidden states", "gradients"), (hidden, slope)
    for what, unchanged, expected, ours in zip(names, before, *results, strict=True):
        _compare(what, ours, expected, float((expected - unchanged).float().norm()))


def _test_norm(library: Library) -> None:
    """Compare a sum with its norm, and all gradients."""
    dtype, source = library.kind.dtype, torch.Generator().manual_seed(2)
    parts = [torch.randn(size, generator=source).to(dtype) for size in ((70, 40), (70, 40), (40,))]
    slopes = [torch.randn(70, 40, generator=source).to(dtype) for _ in range(2)]
    results: list[list[Tensor]] = []
    for operations in (Operations(), NativeOperations(library)):
        hidden, change, weight = (part.clone().requires_grad_() for part in parts)
        norm = SimpleNamespace(weight=weight, variance_epsilon=1e-3)
        total, normed = normed_products(operations, hidden, change, norm, ())
        gradients = torch.autograd.grad((total, normed), (hidden, change, weight), slopes)
        results.append([total.detach(), normed.detach(), *gradients])
    for expected, ours in zip(*results, strict=True):
        _compare("norms", ours, expected, float(expected.float().norm()))


def _test_passes(library: Library) -> None:
    """Compare a norm, a sum and rounded numbers: enough for several threads, at an odd place."""
    source = torch.Generator().manual_seed(6)
    wide, narrow = (torch.randn(40_003, generator=source) for _ in range(2))
    narrow = narrow.to(library.kind.dtype)
    results: list[list[Tensor]] = []
    norms: list[float] = []
    for passes in (Passes(), NativePasses(library)):
        total, out = wide.clone(), torch.zeros_like(narrow)
        passes.add(narrow[1:], total[1:])
        passes.narrow(wide[1:], out[1:])
        results.append([total, out])
        norms.append(float(passes.norm([wide[1:], wide])))
    if not abs(norms[1] - norms[0]) <= 1e-4 * norms[0]:
        raise RuntimeError(f"compiled and plain norms differ: {norms[1]}, {norms[0]}")
    for expected, ours in zip(*results, strict=True):
        _compare("passes over weights", ours, expected, float(expected.float().norm()))


def _test_weight_gradient(library: Library) -> None:
    """Compare gradients of one and of several weights, with more outputs and with more inputs."""
    source = torch.Generator().manual_seed(4)
    for tokens, outputs, inputs in ((70, (96,), 32), (500, (64,), 128), (90, (64, 32), 64)):
        *slopes, x = (
            torch.randn(tokens, size, generator=source).to(library.kind.dtype) for size in (*outputs, inputs)
        )
        gradients = NativeOperations(library).weight_gradients(slopes, x)
        for ours, slope in zip(gradients, slopes, strict=True):
            expected = slope.t() @ x
            _compare("gradients of weights", ours, expected, float(expected.float().norm()))


def _test_few_rows(library: Library) -> None:
    """Compare products of few rows with a packed weight, with and without a bias."""
    dtype, source = library.kind.dtype, torch.Generator().manual_seed(5)
    weight, x = (torch.randn(size, 96, generator=source).to(dtype) for size in (64, 37))
    for bias in (None, torch.randn(64, generator=source).to(dtype)):
        expected = linear(x, weight, bias)
        ours = FewRows(library, weight, bias)(x)
        _compare("products of few rows", ours, expected, float(expected.float().norm()))


def _test_head(library: Library, trained: bool) -> None:
    """Compare log-probabilities, statistics and gradients of a small head."""
    dtype, source = library.kind.dtype, torch.Generator().manual_seed(1)
    weight, hidden = (torch.randn(size, 24, generator=source).to(dtype) for size in (300, 7))
    targets = torch.randint(300, (7,), generator=source)
    slopes = torch.randn(2, 7, generator=source)
    results: list[list[Tensor]] = []
    for native in (False, True):
        start, map_ = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        if native:
            values = native_values(start, map_, targets, library, statistics=True)
        else:
            values = LMHead(map_, None, None).values(start, targets, statistics=True)
        total = (values.logps * slopes[0] + values.logits * slopes[1]).sum()
        inputs = (start, map_) if trained else (start,)
        numbers = values.logps.detach(), values.entropy, values.top1
        results.append([*numbers, *torch.autograd.grad(total, inputs)])
    names = (
        "log-probabilities",
        "entropies",
        "likeliest tokens",
        "gradients of the head's input",
        "of the head",
    )
    for what, expected, ours in zip(names, *results, strict=False):
        _compare(what, ours, expected, float(expected.float().norm()))


def _test_steps(library: Library, layer: Layer) -> None:
    """Compare steps of a layer: with prompts of several lengths, and with more than a block of new tokens."""
    kind = library.kind
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(kind.dtype)

    hidden_size = layer.before.weight.shape[0]
    stores = [kept(3, 2, 40, 20, torch.device("cpu")) for kept in (KeyValueStore, BlockStore)]
    for slot, length in enumerate((5, 40, 19)):
        key, value = (drawn(kind.key_heads, length, kind.size) for _ in range(2))
        for store, keys in zip(stores, (in_pairs(key), key), strict=True):
            store.prompt_lengths[slot] = length
            store.keep(layer.index, slot, keys, value)
    places = [0, 2, 3, 5]
    for token in range(18):
        depth = [token, token, token, 0 if token == 0 else token - 1]
        hidden = drawn(len(places), hidden_size)
        angles = torch.randn(len(places), 1, kind.size // 2, generator=source)
        heads = angles.new_ones(kind.query_heads + kind.key_heads, 1)
        heads[: kind.query_heads] = layer.scaling
        turns = torch.polar(torch.ones_like(angles), angles) * heads
        plain, native = (store.step(places, depth) for store in stores)
        expected = layer(hidden, turns, plain, torch.Size((len(hidden), 1)))
        rows = Rows(library, layer, hidden.clone(), turns, native)  # type: ignore[arg-type]
        change = rows.through(layer, None)
        added = float((expected - hidden).float().norm())
        _compare("sampling steps", rows.hidden + change, expected, added)


def _test_draws(library: Library) -> None:
    """Compare draws, with a temperature and with tokens that are not allowed in some rows."""
    source = torch.Generator().manual_seed(3)
    logits = torch.randn(9, 700, generator=source).to(library.kind.dtype)
    uniforms = torch.rand(9, dtype=torch.float64, generator=source)
    barred = Barred(torch.arange(9) % 2 == 0, torch.tensor([3, 500]))
    for temperature in (1.0, 0.7):
        options = Sampling.model_validate({"temperature": temperature})
        expected = choose(logits.float(), options, uniforms, barred=barred)
        ours = native_choice(library, logits, options, uniforms, barred)
        if int((ours[0] != expected[0]).sum()) > 1:  # one number may fall on a boundary
            raise RuntimeError("compiled and plain draws differ")
        same = ours[0] == expected[0]
        for one, other in zip(ours[1:], expected[1:], strict=True):
            _compare("log-probabilities of draws", one[same], other[same], float(other[same].norm()))
