"""The layers of a sampling step on a CPU as one function compiled by torch (`--compile`).

A step runs some 45 small operations per layer beside its products, for which the interpreter and the memory
traffic cost as much as the arithmetic. torch.compile fuses them into a few loops. The products stay with the
packed weights of `fused`, as operations that the compiler does not look into. All layers share one function,
since weights, keys and values are its arguments. Its shapes are symbols, so it serves every step: a finished
row, a longer completion or another prompt compile nothing.

The function is compiled before the first step, always for the same example. Its code therefore depends on the
model, the processor, the number of threads and the version of torch, but not on the work, and a resumed run
computes the same numbers.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import silu

from palate.model.fast.decode import KeyValueStore, Step
from palate.model.fast.fused import Fused, Joined, Layer

log = logging.getLogger("palate")

EXAMPLE = {"slots": 13, "rows": 5, "longest": 47, "new": 37, "tokens": 31, "active": 59}
"""Sizes of the step that the function is compiled for: all different, so that torch takes none for another,
and large enough to use several threads."""
BACKEND = "inductor"
"""The compiler; tests of everything around it use a faster one."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of compiled and plain hidden states beside rounding, relative to what a layer adds."""


FAILURES = (
    *(RuntimeError, OSError, ImportError, AssertionError),
    *(TypeError, ValueError, AttributeError, LookupError),
)
"""Errors of the parts of a compiler; those of torch are RuntimeErrors."""


# ---- Products --------------------------------------------------------------------------------------

_JOINED: WeakValueDictionary[int, Joined] = WeakValueDictionary()
_FIRST: WeakKeyDictionary[Layer, int] = WeakKeyDictionary()
_NUMBERS = count(1 << 20)  # torch takes a number for a size if they are equal in the example
_LIBRARY = torch.library.Library("palate", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("joined(Tensor x, SymInt number, int outputs) -> Tensor")  # type: ignore[no-untyped-call]


def _product(x: Tensor, number: int, outputs: int) -> Tensor:
    return _JOINED[number](x)


def _shape_of_product(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(x.shape[0], outputs)


_LIBRARY.impl("joined", _product, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("palate::joined", _shape_of_product, lib=_LIBRARY)


def _numbered(layer: Layer) -> int:
    """Return the number of a layer's first product for the compiled function; the others follow it."""
    if layer not in _FIRST:
        numbers = [next(_NUMBERS) for _ in layer.products]
        _JOINED.update(zip(numbers, layer.products, strict=True))
        _FIRST[layer] = numbers[0]
    return _FIRST[layer]


# ---- The function ----------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The properties of layers and steps that share a compiled function."""

    dtype: torch.dtype
    query_heads: int
    key_heads: int
    size: int
    hidden: int
    outputs: tuple[int, ...]
    eps: tuple[float, ...]
    one_slot: bool
    one_row: bool
    threads: int

    @classmethod
    def of(cls, fused: Fused, *, slots: int, rows: int) -> Kind:
        """Return the kind of a network's layers, for steps of a number of slots and of rows in each."""
        layer = fused.layers[0]
        norms = [norm for norm in (layer.before, layer.between, *layer.norms) if norm is not None]
        return cls(
            norms[0].weight.dtype,
            layer.query_heads,
            layer.key_heads,
            layer.size,
            norms[0].weight.shape[0],
            tuple(joined.outputs for joined in layer.products),
            tuple(norm.variance_epsilon for norm in norms),
            slots == 1,
            rows == 1,
            torch.get_num_threads(),
        )


Function = Callable[..., Tensor]
"""Returns a layer's hidden states (M, H) in a step, from `_arguments`, and stores its keys and values."""


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def _function(kind: Kind, uncompiled: Callable[[], None]) -> Function:
    """Return the function of a kind in plain operations. `uncompiled` is called when it runs so."""
    heads, kv, size, group = kind.query_heads, kind.key_heads, kind.size, kind.query_heads // kind.key_heads
    product: Callable[[Tensor, int, int], Tensor] = torch.ops.palate.joined

    def layer(
        hidden: Tensor, turns: Tensor, slot: Tensor, row: Tensor, at: Tensor, prompt_seen: Tensor,
        own_seen: Tensor, prompt_keys: Tensor, prompt_values: Tensor, keys: Tensor, values: Tensor,
        before: Tensor, between: Tensor, norms: tuple[Tensor, ...], number: int,
    ) -> Tensor:  # fmt: skip
        if not torch.compiler.is_compiling():
            uncompiled()
        slots, _, rows, new, _ = keys.shape
        stored, longest, tokens = prompt_keys.shape[2], prompt_seen.shape[-1], own_seen.shape[-1]
        joined = product(_normed(hidden, before, kind.eps[0]), number, kind.outputs[0])
        turned = joined[:, : (heads + kv) * size].view(-1, heads + kv, size)
        if norms:
            parts = _normed(turned[:, :heads], norms[0], kind.eps[2]), turned[:, heads:]
            turned = torch.cat((parts[0], _normed(parts[1], norms[1], kind.eps[3])), 1)
        pairs = turned.float().view(-1, heads + kv, size // 2, 2)
        first, second, cos, sin = pairs[..., 0], pairs[..., 1], turns[..., 0], turns[..., 1]
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(2)
        keys[slot, :, row, at] = turned[:, heads:]
        values[slot, :, row, at] = joined[:, (heads + kv) * size :].view(-1, kv, size)
        grid = turned.new_zeros(slots, kv, rows, group, size)
        grid[slot, :, row] = turned[:, :heads].view(-1, kv, group, size)
        # The softmax over the prompt and the own tokens, divided after the products with the values.
        own_keys = keys.view(-1, new, size)[:, :tokens]
        shared_keys = prompt_keys.view(-1, stored, size)[:, :longest]
        shared = torch.bmm(grid.view(-1, rows * group, size), shared_keys.transpose(1, 2))
        own = torch.bmm(grid.view(-1, group, size), own_keys.transpose(1, 2))
        shared = shared.view(slots, kv, rows, group, longest) + prompt_seen
        own = own.view(slots, kv, rows, group, tokens) + own_seen
        most = torch.maximum(shared.amax(-1, keepdim=True), own.amax(-1, keepdim=True))
        shared, own = (shared - most).exp(), (own - most).exp()
        total = shared.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        own = own.to(values.dtype).view(-1, group, tokens)
        shared = shared.to(values.dtype).view(-1, rows * group, longest)
        of_own = torch.bmm(own, values.view(-1, new, size)[:, :tokens])
        of_prompt = torch.bmm(shared, prompt_values.view(-1, stored, size)[:, :longest])
        shape = slots, kv, rows, group, size
        output = (of_own.view(shape).float() + of_prompt.view(shape).float()) / total
        attended = output[slot, :, row].to(hidden.dtype).reshape(-1, heads * size)
        hidden = hidden + product(attended, number + 1, kind.outputs[1])
        gate, up = product(_normed(hidden, between, kind.eps[1]), number + 2, kind.outputs[2]).chunk(2, -1)
        return hidden + product(silu(gate) * up, number + 3, kind.outputs[3])

    layer.__code__ = layer.__code__.replace()  # torch.compile finds its functions by their code
    return layer


class _Weights:
    """The arguments of the function that belong to a layer: its norms and the number of its products."""

    def __init__(self, layer: Layer) -> None:
        norms = [layer.before, layer.between, *(norm for norm in layer.norms if norm is not None)]
        # torch compiles weights with and without gradient apart.
        before, between, *others = (norm.weight.detach() for norm in norms)
        self.all = before, between, tuple(others), _numbered(layer)


class _Seen:
    """The keys that each row sees: of its prompt, and of its own tokens, for each window."""

    def __init__(self, step: Step, like: Tensor) -> None:
        self._step, self._like = step, like
        self._parts: dict[int | None, tuple[Tensor, Tensor]] = {}

    def __getitem__(self, window: int | None) -> tuple[Tensor, Tensor]:
        if window not in self._parts:
            both, longest = self._step.seen(window, self._like), self._step.longest
            self._parts[window] = both[..., :longest].contiguous(), both[..., longest:].contiguous()
        return self._parts[window]


def _arguments(
    layer: Layer, weights: _Weights, hidden: Tensor, turns: Tensor, step: Step, seen: _Seen
) -> tuple[Any, ...]:
    stored = step.store.layers[layer.index]
    return hidden, turns, *step.slot_row, step.at, *seen[layer.window], *stored, *weights.all


# ---- Steps -----------------------------------------------------------------------------------------


class CompiledStep:
    """Computes the hidden states of a step with the compiled function; see `StepStates`.

    Args:
        fused: the layers.
        function: the function of their kind.
    """

    def __init__(self, fused: Fused, function: Function) -> None:
        self._fused, self._function = fused, function
        self._weights = [_Weights(layer) for layer in fused.layers]

    def __call__(self, input_ids: Tensor, position_ids: Tensor, step: Step) -> Tensor:
        """Return the last hidden states (B, 1, H)."""
        if min(len(input_ids), step.tokens, step.longest) == 1:  # torch compiles sizes of one apart
            return self._fused.states(input_ids, position_ids, step)
        hidden, turns = self._fused.before(input_ids, position_ids, step=True)
        turned = torch.view_as_real(turns)
        seen = _Seen(step, turned)
        with torch.compiler.set_stance("eager_on_recompile"):
            for layer, weights in zip(self._fused.layers, self._weights, strict=True):
                hidden = self._function(*_arguments(layer, weights, hidden, turned, step, seen))
        return self._fused.after(hidden)[:, None]


_FUNCTIONS: dict[Kind, Function | None] = {}
"""The compiled functions of this process; None if compiling failed."""


def compiled_step(fused: Fused, *, slots: int, rows: int) -> CompiledStep | None:
    """Return the compiled step of a network's layers; None, with a warning once, if they cannot be compiled.

    Args:
        fused: the layers.
        slots, rows: number of prompts in progress, and of completions of each.
    """
    if slots == rows == 1:
        return None  # single rows are sampled plain
    kind = Kind.of(fused, slots=slots, rows=rows)
    if kind not in _FUNCTIONS:
        try:
            _FUNCTIONS[kind] = _tested(kind, fused)
        except FAILURES as error:
            _FUNCTIONS[kind] = None
            reason = " ".join(str(error).split())[:160]
            # An error, because processes other than the first log no warnings.
            log.error(
                "sampling falls back to its plain steps, because compiling failed: %s: %s",
                type(error).__name__,
                reason,
            )
    function = _FUNCTIONS[kind]
    return None if function is None else CompiledStep(fused, function)


def _tested(kind: Kind, fused: Fused) -> Function:
    """Compile the function of a kind for the example, and compare it with the first layer's plain step.

    Raises:
        RuntimeError: the results differ, or torch.compile is switched off.
    """
    runs = {"plain": 0}

    def count_plain() -> None:
        runs["plain"] += 1
        if compiled and runs["plain"] == 1:
            log.warning("torch does not use the compiled sampling step here, so some steps are plain")

    compiled = False
    layer = fused.layers[0]
    plain, step, hidden, turns = _example(kind, layer)
    expected = layer(hidden, turns, plain, torch.Size((len(hidden), 1)))
    turned = torch.view_as_real(turns)
    arguments = _arguments(layer, _Weights(layer), hidden, turned, step, _Seen(step, turned))
    _fix_sizes(arguments)
    function: Function = torch.compile(
        _function(kind, count_plain), backend=BACKEND, dynamic=True, fullgraph=True
    )
    with _one_compiler(kind.threads):
        result = function(*arguments)
    if runs["plain"]:
        raise RuntimeError("torch.compile is switched off; is TORCHDYNAMO_DISABLE set?")
    gap = float((result.float() - expected.float()).norm())
    change = float((expected.float() - hidden.float()).norm())  # by the layer alone
    rounding = torch.finfo(kind.dtype).eps * float(expected.float().norm())
    if not gap <= CLOSE[kind.dtype] * change + rounding:
        raise RuntimeError(
            f"compiled and plain hidden states differ by {gap / change:.1%} of what a layer adds"
        )
    compiled = True
    return function


def _fix_sizes(arguments: tuple[Any, ...]) -> None:
    """Mark the sizes that the model decides; all others are symbols in the compiled function."""
    hidden, turns, _, _, _, _, _, prompt_keys, prompt_values, keys, values, before, between, norms, _ = (
        arguments
    )
    static = torch._dynamo.mark_static
    static(hidden, 1)
    static(turns, [1, 2, 3])
    for stored, dims in ((prompt_keys, [1, 3]), (prompt_values, [1, 3]), (keys, [1, 4]), (values, [1, 4])):
        static(stored, dims)
    for weight in (before, between, *norms):
        static(weight, 0)


def _example(kind: Kind, layer: Layer) -> tuple[Step, Step, Tensor, Tensor]:
    """Return the example's step twice, its hidden states (M, H) and its rotations."""
    sizes = dict(EXAMPLE)
    if kind.one_slot or kind.one_row:
        alone = sizes["active"] + 8
        sizes |= {"slots": 1 if kind.one_slot else alone, "rows": 1 if kind.one_row else alone}
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    active = min(sizes["active"], sizes["slots"] * sizes["rows"])
    places = list(range(active))
    depth = [(7 * place) % sizes["tokens"] for place in places]
    depth[0] = sizes["tokens"] - 1
    steps = []
    for _ in range(2):
        store = KeyValueStore(
            sizes["slots"], sizes["rows"], sizes["longest"] + 3, sizes["new"], torch.device("cpu")
        )
        store.prompt_lengths[:] = sizes["longest"]
        source.manual_seed(0)
        like = torch.empty(1, kind.key_heads, 1, kind.size, dtype=kind.dtype)
        for part in store.layer(layer.index, like):
            part.copy_(drawn(*part.shape))
        steps.append(store.step(places, depth))
    angles = drawn(active, 1, kind.size // 2)
    turns = torch.polar(torch.ones_like(angles), angles)
    heads = turns.new_ones(kind.query_heads + kind.key_heads, 1)
    heads[: kind.query_heads] = layer.scaling
    return steps[0], steps[1], drawn(active, kind.hidden).to(kind.dtype), turns * heads


@contextmanager
def _one_compiler(threads: int) -> Iterator[None]:
    """Compile code for a number of threads, which is then part of the name in torch's cache.

    It compiles in this process: a pool of compiling processes takes memory and outlives the work.
    """
    import torch._inductor.config as inductor

    options: dict[str, Any] = {"cpp.threads": threads}
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        options["compile_threads"] = 1
    with inductor.patch(options):
        yield
