"""A sampling step on a CPU with compiled functions (see `native`): eight calls a layer.

A plain step runs some 200 operations of torch per layer. For a few rows each takes microseconds, and most of
that is the interpreter, new memory and waiting threads. Here a layer is its four products, with the packed
weights of `fused`, and four functions: two norms with the addition before them, the attention with rotation
and storage of the new keys, and the gate. Keys are stored in blocks (`BlockStore`), which makes scores of 16
keys one vector.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from palate.config import Sampling
from palate.errors import RunError
from palate.model.fast.decode import KeyValueStore
from palate.model.fast.fused import Fused, Layer
from palate.model.fast.lean import states_of
from palate.model.fast.native import FAILURES, Kind, Library, log
from palate.model.fast.native_layers import NativeOperations
from palate.model.sampling import NOT_FINITE, Barred

BLOCK = 16
"""Number of keys in a block, and the multiple to which the numbers of a value are padded."""


# ---- Keys and values -------------------------------------------------------------------------------


def _up(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def in_pairs(key: Tensor) -> Tensor:
    """Return keys in the order of `fused`, in which the two numbers that are rotated are neighbours."""
    return key.reshape(*key.shape[:-1], 2, -1).transpose(-1, -2).reshape(key.shape)


class BlockStore(KeyValueStore):
    """Keys in blocks of 16: number d of all keys of a block is one vector; values are padded.

    Shapes per layer: prompt keys (slots, kv heads, longest / 16, D, 16) and row keys (slots * rows, kv heads,
    new / 16, D, 16); values (slots, kv heads, longest, padded D) and
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
                    like.new_zeros(keys),
                    like.new_zeros(count, heads, _up(most), _up(size)),
                ]
            self.layers[index] = parts[0], parts[1], parts[2], parts[3]
        return self.layers[index]

    def keep(self, index: int, slot: int, key: Tensor, value: Tensor) -> None:
        """Store a prompt's keys and values, (kv heads, T, D), as `lean` computes them."""
        keys, values, _, _ = self.layer(index, key[None])
        heads, length, size = key.shape
        padded = torch.nn.functional.pad(in_pairs(key), (0, 0, 0, _up(length) - length))
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
        self.prompts = states_of(fused.network, operations=NativeOperations(library))

    def __call__(self, input_ids: Tensor, position_ids: Tensor, step: BlockStep) -> Tensor:
        """Return the last hidden states (B, 1, H)."""
        hidden, turns = self._fused.before(input_ids, position_ids, step=True)
        rows = Rows(self._library, self._fused.layers[0], hidden.clone(), turns, step)
        change: Tensor | None = None
        for layer in self._fused.layers:
            change = rows.through(layer, change)
        return rows.normalised(self._fused.norm, change)[:, None]

    def choose(
        self, logits: Tensor, sampling: Sampling, uniforms: Tensor, barred: Barred | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token per row; see `native_choice`."""
        return native_choice(self._library, logits, sampling, uniforms, barred)


def native_choice(
    library: Library, logits: Tensor, sampling: Sampling, uniforms: Tensor, barred: Barred | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token per row, from a distribution without restrictions; see `sampling.choose`.

    logits (B, V) in the format of the weights.
    """
    count, size = logits.shape
    early = torch.zeros(count, dtype=torch.bool) if barred is None else barred.rows
    ends = torch.empty(0, dtype=torch.int64) if barred is None else barred.tokens
    tokens = torch.empty(count, dtype=torch.int64)
    logps, drawn = torch.empty(2, count)
    faults = library.draw(
        logits,
        count,
        size,
        sampling.temperature,
        uniforms,
        early,
        ends,
        len(ends),
        tokens,
        logps,
        drawn,
    )
    if faults:
        raise RunError(NOT_FINITE)
    return tokens, logps, drawn


class Rows:
    """The memory of a step: the hidden states, and results between products.

    Attributes:
        hidden: the hidden states (M, H), which each layer changes.
    """

    def __init__(self, library: Library, like: Layer, hidden: Tensor, turns: Tensor, step: BlockStep) -> None:
        self._library, self.hidden, self._step = library, hidden, step
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
        gate = joined.data_ptr()
        up = gate + self._inner * joined.element_size()
        self._library.gate(gate, up, 2 * self._inner, self._gated, self._rows, self._inner)
        return down(self._gated)

    def normalised(self, norm: Any, change: Tensor | None) -> Tensor:
        """Add a change to the hidden states and return their norm. (M, H)"""
        total = self.hidden
        self._library.normalise(
            total,
            change,
            total,
            norm.weight,
            self._normed,
            None,
            self._rows,
            self._size,
            norm.variance_epsilon,
        )
        return self._normed

    def _attend(self, layer: Layer, joined: Tensor) -> None:
        store, places, depth = self._step
        prompt_keys, prompt_values, keys, values = store.layers[layer.index]
        norms = [None if norm is None else norm.weight for norm in layer.norms]
        eps = 0.0 if layer.norms[0] is None else layer.norms[0].variance_epsilon
        self._library.attend(
            joined,
            self._turns,
            places,
            depth,
            store.prompt_lengths,
            self._rows,
            store.rows,
            prompt_keys,
            prompt_values,
            prompt_values.shape[2],
            keys,
            values,
            values.shape[2],
            *norms,
            eps,
            layer.window or 0,
            self._attended,
        )


_FAILED: set[Kind] = set()
"""Kinds of layers whose steps are wrong when they are compiled."""


def steps_of(fused: Fused, library: Library) -> NativeStep | None:
    """Return the compiled step of a network; None, with an error in the log, if its results are wrong."""
    if library.kind in _FAILED:
        return None
    if not library.tested_steps:
        from palate.model.fast.native_test import test_steps  # needs this module

        try:
            test_steps(library, fused.layers[0])
            library.tested_steps = True
        except FAILURES as error:
            _FAILED.add(library.kind)
            log.error("sampling is not compiled: %s", error)
            return None
    return NativeStep(fused, library)
