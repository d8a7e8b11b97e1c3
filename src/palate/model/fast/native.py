"""The small operations of a sampling step on a CPU, compiled from `native.cpp` (`--compile`).

A plain step runs some 200 operations of torch per layer. For a few rows each takes microseconds, and most of
that is the interpreter, new memory and waiting threads. Here a layer is eight calls: its four products, with
the packed weights of `fused`, and four functions in C++: two norms with the addition before them, the
attention with rotation and storage of the new keys, and the gate. Keys are stored in blocks (`BlockStore`),
which makes scores of 16 keys one vector.

The code depends on the sizes of heads, the number format and the processor, not on the work. It is compiled
once and kept in torch's directory of compiled code.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.config import Sampling
from palate.errors import RunError
from palate.model.fast.decode import KeyValueStore
from palate.model.fast.fused import Fused, Layer
from palate.model.sampling import NOT_FINITE, Barred

log = logging.getLogger("palate")

BLOCK = 16
"""Number of keys in a block, and the multiple to which the numbers of a value are padded."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
"""Largest difference of native and plain hidden states beside rounding, relative to what a layer adds."""
FAILURES = (
    *(RuntimeError, OSError, ImportError, AssertionError),
    *(TypeError, ValueError, AttributeError, LookupError),
)
"""Errors of the parts of a compiler; those of torch are RuntimeErrors."""

_POINTER, _INTEGER, _REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES: dict[str, list[Any]] = {
    "normalise": [*[_POINTER] * 4, *[_INTEGER] * 2, _REAL],
    "gate": [*[_POINTER] * 2, *[_INTEGER] * 2],
    "attend": [
        *[_POINTER] * 5, *[_INTEGER] * 2, *[_POINTER] * 2, _INTEGER, *[_POINTER] * 2, _INTEGER,
        *[_POINTER] * 2, _REAL, _INTEGER, _POINTER,
    ],
    "draw": [_POINTER, *[_INTEGER] * 2, _REAL, *[_POINTER] * 3, _INTEGER, *[_POINTER] * 3],
}  # fmt: skip
"""The arguments of the functions in `native.cpp`."""


class Kind(NamedTuple):
    """The properties of layers that share compiled functions."""

    dtype: torch.dtype
    query_heads: int
    key_heads: int
    size: int

    @classmethod
    def of(cls, fused: Fused) -> Kind:
        """Return the kind of a network's layers."""
        layer = fused.layers[0]
        return cls(layer.before.weight.dtype, layer.query_heads, layer.key_heads, layer.size)


class Library(NamedTuple):
    """The functions of `native.cpp`, for layers of a kind."""

    normalise: Callable[..., None]
    gate: Callable[..., None]
    attend: Callable[..., None]
    draw: Callable[..., int]


def compiled(kind: Kind) -> Library:
    """Compile the functions for a kind, or find them in torch's directory of compiled code.

    Raises:
        Exception: one of `FAILURES`.
    """
    from torch._inductor.codecache import CppCodeCache

    sizes = {"QUERY_HEADS": kind.query_heads, "KEY_HEADS": kind.key_heads, "SIZE": kind.size}
    numbers = {"HALF": int(kind.dtype == torch.bfloat16), **sizes}
    # Code for one processor may not run on another, so its abilities are part of what is compiled.
    lines = [f"// {torch.backends.cpu.get_cpu_capability()}"]
    lines += [f"#define {name} {number}" for name, number in numbers.items()]
    source = Path(__file__).with_name("native.cpp").read_text(encoding="utf-8")
    library = CppCodeCache.load(
        "\n".join([*lines, source]), extra_flags=("-ffp-contract=fast",), needs_vec_isa=False
    )
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int64 if name == "draw" else None
    return Library(*(getattr(library, name) for name in Library._fields))


# ---- Keys and values -------------------------------------------------------------------------------


def _up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class BlockStore(KeyValueStore):
    """Keys in blocks of 16: number d of all keys of a block is one vector; values are padded.

    Shapes per layer: prompt keys (slots, kv heads, longest / 16, D, 16) and row keys (slots * rows, kv heads,
    new / 16, D, 16) in float32; values (slots, kv heads, longest, padded D) and
    (slots * rows, kv heads, new, padded D). `longest` and `new` are multiples of 16.
    """

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return prompt keys, prompt values, row keys and row values of a layer, allocated on first use."""
        if index not in self.layers:
            _, heads, _, size = like.shape
            parts = []
            for count, most in ((self.slots, self.longest), (self.slots * self.rows, self.new_tokens)):
                keys = count, heads, _up(most) // BLOCK, size, BLOCK
                parts += [
                    like.new_zeros(keys, dtype=torch.float32),
                    like.new_zeros(count, heads, _up(most), _up(size)),
                ]
            self.layers[index] = parts[0], parts[1], parts[2], parts[3]
        return self.layers[index]

    def keep(self, index: int, slot: int, key: Tensor, value: Tensor) -> None:
        """Store a prompt's keys and values, (kv heads, T, D)."""
        keys, values, _, _ = self.layer(index, key[None])
        heads, length, size = key.shape
        padded = torch.nn.functional.pad(key.float(), (0, 0, 0, _up(length) - length))
        blocks = padded.view(heads, -1, BLOCK, size).transpose(2, 3)
        keys[slot, :, : blocks.shape[1]] = blocks
        values[slot, :, :length, :size] = value

    def step(self, places: list[int], depth: list[int]) -> BlockStep:  # type: ignore[override]
        """Return the rows of a step; see `KeyValueStore.step`."""
        return BlockStep(self, torch.tensor(places), torch.tensor(depth))


class BlockStep(NamedTuple):
    """A new token for each of some rows: their places in the grid, ascending, and their own tokens so far."""

    store: BlockStore
    places: Tensor
    depth: Tensor


# ---- Steps -----------------------------------------------------------------------------------------


class NativeStep:
    """Computes the hidden states of a step with the compiled functions; see `StepStates`.

    Args:
        fused: the layers.
        library: the functions of their kind.
    """

    store = BlockStore
    """The kind of store that its steps come from."""

    def __init__(self, fused: Fused, library: Library) -> None:
        self._fused, self._library = fused, library

    def __call__(self, input_ids: Tensor, position_ids: Tensor, step: BlockStep) -> Tensor:
        """Return the last hidden states (B, 1, H)."""
        hidden, turns = self._fused.before(input_ids, position_ids, step=True)
        rows = _Rows(self._library, self._fused.layers[0], hidden.clone(), turns, step)
        change: Tensor | None = None
        for layer in self._fused.layers:
            change = rows.through(layer, change)
        return rows.normalised(self._fused.norm, change)[:, None]

    def choose(
        self, logits: Tensor, sampling: Sampling, uniforms: Tensor, barred: Barred | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token per row, from a distribution without restrictions; see `sampling.choose`.

        logits (B, V) in the format of the weights.
        """
        count, size = logits.shape
        early = torch.zeros(count, dtype=torch.bool) if barred is None else barred.rows
        ends = torch.empty(0, dtype=torch.int64) if barred is None else barred.tokens
        tokens = torch.empty(count, dtype=torch.int64)
        logps, drawn = torch.empty(2, count)
        faults = self._library.draw(
            logits.data_ptr(),
            count,
            size,
            sampling.temperature,
            uniforms.data_ptr(),
            early.data_ptr(),
            ends.data_ptr(),
            len(ends),
            tokens.data_ptr(),
            logps.data_ptr(),
            drawn.data_ptr(),
        )
        if faults:
            raise RunError(NOT_FINITE)
        return tokens, logps, drawn


class _Rows:
    """The memory of a step: hidden states (M, H), which it changes, and results between products."""

    def __init__(self, library: Library, like: Layer, hidden: Tensor, turns: Tensor, step: BlockStep) -> None:
        self._library, self._hidden, self._step = library, hidden, step
        self._turns = torch.view_as_real(turns).contiguous()
        self._rows, self._size = hidden.shape
        self._normed = torch.empty_like(hidden)
        self._attended = hidden.new_empty(self._rows, like.query_heads * like.size)
        self._inner = like.products[2].outputs // 2
        self._gated = hidden.new_empty(self._rows, self._inner)

    def through(self, layer: Layer, change: Tensor | None) -> Tensor:
        """Add the change of the layer before to the hidden states; return the layer's last change. (M, H)"""
        first, output, gate_up, down = layer.products
        self._attend(layer, first(self.normalised(layer.before, change)))
        joined = gate_up(self.normalised(layer.between, output(self._attended)))
        self._library.gate(joined.data_ptr(), self._gated.data_ptr(), self._rows, self._inner)
        return down(self._gated)

    def normalised(self, norm: Any, change: Tensor | None) -> Tensor:
        """Add a change to the hidden states and return their norm. (M, H)"""
        self._library.normalise(
            self._hidden.data_ptr(),
            0 if change is None else change.data_ptr(),
            norm.weight.data_ptr(),
            self._normed.data_ptr(),
            self._rows,
            self._size,
            norm.variance_epsilon,
        )
        return self._normed

    def _attend(self, layer: Layer, joined: Tensor) -> None:
        store, places, depth = self._step
        prompt_keys, prompt_values, keys, values = store.layers[layer.index]
        norms = [
            (0, 0.0) if norm is None else (norm.weight.data_ptr(), norm.variance_epsilon)
            for norm in layer.norms
        ]
        self._library.attend(
            joined.data_ptr(),
            self._turns.data_ptr(),
            places.data_ptr(),
            depth.data_ptr(),
            store.prompt_lengths.data_ptr(),
            self._rows,
            store.rows,
            prompt_keys.data_ptr(),
            prompt_values.data_ptr(),
            prompt_values.shape[2],
            keys.data_ptr(),
            values.data_ptr(),
            values.shape[2],
            norms[0][0],
            norms[1][0],
            norms[0][1],
            layer.window or 0,
            self._attended.data_ptr(),
        )


_LIBRARIES: dict[Kind, Library | None] = {}
"""The functions of this process, after their test; None if they failed."""


def native_step(fused: Fused) -> NativeStep | None:
    """Return the compiled step of a network's layers; None, with an error in the log once, if that fails."""
    kind = Kind.of(fused)
    if kind not in _LIBRARIES:
        try:
            _LIBRARIES[kind] = _tested(kind, fused.layers[0])
        except FAILURES as error:
            _LIBRARIES[kind] = None
            reason = " ".join(str(error).split())[:160]
            # An error, because processes other than the first log no warnings.
            log.error(
                "sampling falls back to its plain steps, because compiling failed: %s: %s",
                type(error).__name__,
                reason,
            )
    library = _LIBRARIES[kind]
    return None if library is None else NativeStep(fused, library)


@torch.no_grad()
def _tested(kind: Kind, layer: Layer) -> Library:
    """Compile the functions of a kind, and compare a layer's steps with plain ones, on an example.

    Raises:
        RuntimeError: the results differ.
    """
    library = compiled(kind)
    source = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(kind.dtype)

    hidden_size = layer.before.weight.shape[0]
    stores = [kept(3, 2, 40, 20, torch.device("cpu")) for kept in (KeyValueStore, BlockStore)]
    for slot, length in enumerate((5, 40, 19)):
        prompt = drawn(kind.key_heads, length, kind.size), drawn(kind.key_heads, length, kind.size)
        for store in stores:
            store.prompt_lengths[slot] = length
            store.keep(layer.index, slot, *prompt)
    places = [0, 2, 3, 5]
    for token in range(18):
        depth = [token, token, token, 0 if token == 0 else token - 1]
        hidden = drawn(len(places), hidden_size)
        angles = torch.randn(len(places), 1, kind.size // 2, generator=source)
        heads = angles.new_ones(kind.query_heads + kind.key_heads, 1)
        heads[: kind.query_heads] = layer.scaling
        turns = torch.polar(torch.ones_like(angles), angles) * heads
        plain, native = (store.step(places, depth) for store in stores)
        expected = layer(hidden, turns, plain, torch.Size((len(hidden), 1))).float()
        rows = _Rows(library, layer, hidden.clone(), turns, native)  # type: ignore[arg-type]
        change = rows.through(layer, None)
        result = (rows._hidden + change).float()
        added = float((expected - hidden.float()).norm())
        gap = float((result - expected).norm())
        if not gap <= CLOSE[kind.dtype] * added + torch.finfo(kind.dtype).eps * float(expected.norm()):
            raise RuntimeError(
                f"compiled and plain hidden states differ by {gap / added:.1%} of what a layer adds"
            )
    return library
