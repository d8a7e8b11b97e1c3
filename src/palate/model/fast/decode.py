"""The fast sampling engine: shared prompts, keys and values stored in place, no idle rows.

Each prompt has a slot of n rows. A prompt is computed once, packed with others, and all its rows use its
keys and values; the space for each row's new tokens is allocated once. Finished rows leave the batch
immediately, and a slot whose rows are all finished takes the next prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from palate.config import Sampling
from palate.model.codec import Codec
from palate.model.fast.attention import Attention, Layout, following
from palate.model.fast.fused import Fused
from palate.model.fast.head import LMHead, product
from palate.model.fast.layout import PackedLayout, positions
from palate.model.fast.lean import states_of
from palate.model.rows import Row, cut
from palate.model.sampling import Barred, choose, restricts

PREFILL_TOKENS = 4096
"""Most prompt tokens in one forward pass."""


class StepStates(Protocol):
    """Computes the last hidden states of steps that come from a store of the class `store`, and draws."""

    @property
    def store(self) -> type[KeyValueStore]:
        """The class of the store."""

    def __call__(self, input_ids: Tensor, position_ids: Tensor, step: Any) -> Tensor:
        """Return the states (B, 1, H), as `States`."""

    def prompts(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """Return the states of prompts, as `States`."""

    def choose(
        self, logits: Tensor, sampling: Sampling, uniforms: Tensor, barred: Barred | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token per row, if no option but the temperature changes the distribution."""


class Decoder:
    """Fills rows with tokens.

    Args:
        network: a causal model whose layers follow layouts.
        head: the model's head.
        codec: the tokenizer, for end tokens and stop texts.
        sampling: the options.
        slots: number of prompts in progress at a time.
        rows: number of completions per prompt.
        longest: number of tokens of the longest prompt.
        fused: the network's layers with fewer products; None computes with the network's own weights.
        compiled: the same layers with compiled functions, and the draw; None computes them plain.
    """

    def __init__(
        self,
        network: Any,
        head: LMHead,
        codec: Codec,
        sampling: Sampling,
        *,
        slots: int,
        rows: int,
        longest: int,
        fused: Fused | None = None,
        compiled: StepStates | None = None,
    ) -> None:
        self.network, self.head, self.codec, self.sampling, self.fused = network, head, codec, sampling, fused
        self.hidden_states = states_of(network, times=product) if fused is None else fused.states
        if compiled is not None:
            self.hidden_states = compiled.prompts
        self.compiled = compiled
        self.device = torch.device(network.device)
        store = KeyValueStore if compiled is None else compiled.store
        self.store = store(slots, rows, longest, sampling.max_new_tokens, self.device)
        self.rows = rows
        self.at: list[Row | None] = [None] * (slots * rows)
        self.end_ids = torch.tensor(sorted(codec.end_ids), device=self.device)
        self._seen: Tensor | None = None
        self._wide: Tensor | None = None

    def run(self, groups: Iterator[list[Row]]) -> Iterator[int]:
        """Complete groups of rows of one prompt each; yield the number of new tokens of each step."""
        busy: set[int] = set()
        with following(self.network):
            while True:
                free = (slot for slot in range(self.store.slots) if slot not in busy)
                fresh = dict(zip(free, groups, strict=False))
                for some in _portions(fresh):
                    self._begin(some)
                started = sum(map(len, fresh.values()))
                active = sum(row is not None for row in self.at)
                if active:
                    self._step()
                if not active + started:
                    return
                yield started + active
                busy = {place // self.rows for place, row in enumerate(self.at) if row is not None}

    def _begin(self, fresh: dict[int, list[Row]]) -> None:
        """Compute packed prompts, and draw the first token of each of their rows."""
        prompts = [group[0].prompt_ids for group in fresh.values()]
        slots = list(fresh)
        lengths = [len(ids) for ids in prompts]
        layout = Prefill(self.store, slots, lengths)
        hidden = self.hidden_states(
            torch.tensor([[t for ids in prompts for t in ids]]),
            positions([(size, ()) for size in lengths]),
            layout,
        )[0]
        last = torch.tensor(lengths, device=self.device).cumsum(0) - 1
        for slot, group in fresh.items():
            self.at[slot * self.rows : slot * self.rows + len(group)] = group
        # The rows of a prompt draw from the same logits, each with its own uniform number.
        logits = self._logits(hidden[last]).repeat_interleave(self.rows, dim=0)
        places = [slot * self.rows + j for slot in slots for j in range(self.rows)]
        keep = [i for i, place in enumerate(places) if self.at[place] is not None]
        self._draw([places[i] for i in keep], logits[keep] if len(keep) < len(places) else logits)

    def _step(self) -> None:
        """Compute one token for every active row."""
        places = [i for i, row in enumerate(self.at) if row is not None]
        rows = [row for row in self.at if row is not None]
        depth = [len(row.tokens) - 1 for row in rows]
        layout = self.store.step(places, depth)
        states = self.hidden_states if self.compiled is None else self.compiled
        hidden = states(
            torch.tensor([[row.tokens[-1]] for row in rows]),
            torch.tensor([[len(row.prompt_ids) + d] for row, d in zip(rows, depth, strict=True)]),
            layout,
        )[:, 0]
        self._draw(places, self._logits(hidden))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return logits (M, V). hidden (M, H)"""
        if self.fused is None:
            return self.head.logits(hidden)
        return self.head.capped(self.fused.logits(hidden))

    def _draw(self, places: list[int], logits: Tensor) -> None:
        """Draw a token for the rows at `places`, and remove finished rows."""
        rows = [row for place in places if (row := self.at[place]) is not None]
        uniforms = torch.tensor([row.uniforms[len(row.tokens)] for row in rows], dtype=torch.float64)
        barred = None
        if any(len(row.tokens) < self.sampling.min_new_tokens for row in rows):
            early = torch.tensor([len(row.tokens) < self.sampling.min_new_tokens for row in rows])
            barred = Barred(early.to(self.device), self.end_ids)
        if self.compiled is not None and self.head.softcap is None and not restricts(self.sampling):
            tokens, logps, restricted = self.compiled.choose(logits, self.sampling, uniforms, barred)
        else:
            logits = self._widened(logits)
            seen = self._seen_by(places, rows, logits) if self.sampling.repetition_penalty != 1.0 else None
            tokens, logps, restricted = choose(
                logits, self.sampling, uniforms.to(self.device), seen=seen, barred=barred, overwrite=True
            )
        if self._seen is not None:
            self._seen[torch.tensor(places, device=self.device), tokens] = True
        for place, row, token, logp, drawn in zip(
            places, rows, tokens.tolist(), logps.tolist(), restricted.tolist(), strict=True
        ):
            row.add(token, logp, drawn)
            if self._ended(row):
                self.at[place] = None

    def _widened(self, logits: Tensor) -> Tensor:
        """Return the logits in float32; in half precision, all steps use the same memory. (B, V)"""
        if logits.dtype == torch.float32:
            return logits
        if self._wide is None or len(self._wide) < len(logits):
            self._wide = torch.empty_like(logits, dtype=torch.float32)
        return self._wide[: len(logits)].copy_(logits)

    def _ended(self, row: Row) -> bool:
        if row.tokens[-1] in self.codec.end_ids or len(row.tokens) == self.sampling.max_new_tokens:
            return True
        return bool(self.sampling.stop) and cut(self.codec, row.tokens, self.sampling.stop)[1] == "stop"

    def _seen_by(self, places: list[int], rows: list[Row], logits: Tensor) -> Tensor:
        """Return the mask of tokens that each row's prompt or completion already has. (B, V)"""
        if self._seen is None:
            self._seen = torch.zeros(len(self.at), logits.shape[-1], dtype=torch.bool, device=self.device)
        for place, row in zip(places, rows, strict=True):
            if not row.tokens:
                self._seen[place] = False
                self._seen[place, list(row.prompt_ids)] = True
        return self._seen[torch.tensor(places, device=self.device)]


class KeyValueStore:
    """Keys and values of prompts, one copy for all rows of a slot, and of each row's new tokens.

    Shapes per layer: prompts (slots, kv heads, longest, D), rows (slots, kv heads, rows, new tokens, D). On
    a CPU, half-precision keys are stored in float32, since a CPU cannot sum half-precision products in
    float32.
    """

    def __init__(self, slots: int, rows: int, longest: int, new_tokens: int, device: torch.device) -> None:
        self.slots, self.rows, self.longest, self.new_tokens, self.device = (
            slots,
            rows,
            longest,
            new_tokens,
            device,
        )
        self.prompt_lengths = torch.zeros(slots, dtype=torch.int64)
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return prompt keys, prompt values, row keys and row values of a layer, allocated on first use."""
        if index not in self.layers:
            _, heads, _, size = like.shape
            prompts = (self.slots, heads, self.longest, size)
            own = (self.slots, heads, self.rows, self.new_tokens, size)
            key_dtype = torch.float32 if like.device.type == "cpu" else like.dtype
            # Memory must be initialised: masked positions contribute 0 * value, and 0 times NaN is NaN.
            self.layers[index] = (
                like.new_zeros(prompts, dtype=key_dtype),
                like.new_zeros(prompts),
                like.new_zeros(own, dtype=key_dtype),
                like.new_zeros(own),
            )
        return self.layers[index]

    def keep(self, index: int, slot: int, key: Tensor, value: Tensor) -> None:
        """Store a prompt's keys and values, (kv heads, T, D)."""
        keys, values, _, _ = self.layer(index, key[None])
        keys[slot, :, : key.shape[1]] = key
        values[slot, :, : value.shape[1]] = value

    def step(self, places: list[int], depth: list[int]) -> Step:
        """Return the layout of a step for the rows at `places`, which have `depth` own tokens so far."""
        return Step(self, places, depth)


class Prefill(PackedLayout):
    """Packed prompts, each of which sees itself; their keys and values are written to their slots."""

    def __init__(self, store: KeyValueStore, slots: list[int], lengths: list[int]) -> None:
        super().__init__([(length, ()) for length in lengths])
        self.store, self.slots = store, slots
        for slot, length in zip(slots, lengths, strict=True):
            store.prompt_lengths[slot] = length

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """See `PackedLayout`."""
        parts = zip(
            self.slots, torch.split(key, self.sizes, 1), torch.split(value, self.sizes, 1), strict=True
        )
        for slot, k, v in parts:
            self.store.keep(layer, slot, k[0].transpose(0, 1), v[0].transpose(0, 1))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        self.keep(layer, key.transpose(1, 2), value.transpose(1, 2))
        return super().attend(layer, query, key, value, how)


class Step:
    """One new token for some rows of the grid of slots x rows.

    All tensors are in the order (slot, kv head, row, query head of that kv head). In this order, scores of
    the prompt are one matrix product per slot and kv head for all rows, scores of a row's own tokens are one
    product per row and kv head, and both are adjacent without a copy. Inactive rows are computed too and
    discarded, which costs less than gathering the keys of the active rows.
    """

    def __init__(self, store: KeyValueStore, places: list[int], depth: list[int]) -> None:
        self.store = store
        count = store.slots * store.rows
        self.whole = len(places) == count
        self.places = torch.tensor(places, device=store.device)
        self.depth = torch.zeros(count, dtype=torch.int64)
        self.depth[places] = torch.tensor(depth)
        self.longest = int(store.prompt_lengths.max())
        self.tokens = max(depth) + 1
        self.slot_row = self.places // store.rows, self.places % store.rows
        self.at = torch.tensor(depth, device=store.device)
        self.together = self.whole and min(depth) == max(depth)
        self._bias: dict[int | None, Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        prompt_keys, prompt_values, keys, values = self.store.layer(layer, key)
        slots, rows, kv, size = self.store.slots, self.store.rows, key.shape[1], query.shape[-1]
        group = query.shape[1] // kv
        self._write(keys, key)
        self._write(values, value)
        grid = query[:, :, 0].to(keys.dtype)
        grid = grid if how.scaling == 1.0 else grid * how.scaling
        if not self.whole:
            grid = grid.new_zeros(slots * rows, kv * group, size).index_copy_(0, self.places, grid)
        grid = grid.view(slots, rows, kv, group, size).transpose(1, 2).contiguous()
        by_slot = grid.view(slots * kv, rows * group, size)
        by_row = grid.view(slots * kv * rows, group, size)
        own_keys = keys.view(-1, self.store.new_tokens, size)[:, : self.tokens]
        own_values = values.view(-1, self.store.new_tokens, size)[:, : self.tokens]
        shared_keys = prompt_keys.view(-1, self.store.longest, size)[:, : self.longest]
        shared_values = prompt_values.view(-1, self.store.longest, size)[:, : self.longest]

        shared = _scores(by_slot, shared_keys).view(slots, kv, rows, group, self.longest)
        own = _scores(by_row, own_keys).view(slots, kv, rows, group, self.tokens)
        scores = how.scores_cap(torch.cat((shared, own), dim=-1))
        weights = scores.add_(self.seen(how.window, scores)).softmax(-1).to(values.dtype)
        output = torch.bmm(weights.view(slots * kv * rows, group, -1)[:, :, self.longest :], own_values)
        output.view(slots * kv, rows * group, size).baddbmm_(
            weights.view(slots * kv, rows * group, -1)[:, :, : self.longest], shared_values
        )
        out = (
            output.to(value.dtype)
            .view(slots, kv, rows, group, size)
            .transpose(1, 2)
            .reshape(slots * rows, 1, kv * group, size)
        )
        return out if self.whole else out.index_select(0, self.places)

    def _write(self, kept: Tensor, new: Tensor) -> None:
        """Write the new tokens' keys or values, (B, kv heads, 1, D), into the store."""
        new = new.to(kept.dtype)
        if self.together:
            slots, rows = self.store.slots, self.store.rows
            kept[:, :, :, self.tokens - 1] = new.view(slots, rows, *new.shape[1:]).transpose(1, 2)[..., 0, :]
        else:
            kept[self.slot_row[0], :, self.slot_row[1], self.at] = new[:, :, 0]

    def seen(self, window: int | None, like: Tensor) -> Tensor:
        """Return the bias: 0 if a row sees a key, else -inf. (slots, 1, rows, 1, longest + tokens)"""
        if window not in self._bias:
            lengths = self.store.prompt_lengths.repeat_interleave(self.store.rows)[:, None]
            depth = self.depth[:, None]
            prompt_at, own_at = torch.arange(self.longest)[None], torch.arange(self.tokens)[None]
            prompt_seen, own_seen = prompt_at < lengths, own_at <= depth
            if window is not None:
                prompt_seen = prompt_seen & (lengths + depth - prompt_at < window)
                own_seen = own_seen & (depth - own_at < window)
            bias = torch.zeros(len(depth), self.longest + self.tokens)
            bias.masked_fill_(~torch.cat((prompt_seen, own_seen), dim=-1), -torch.inf)
            grid = bias.view(self.store.slots, 1, self.store.rows, 1, -1)
            self._bias[window] = grid.to(like.device, like.dtype)
        return self._bias[window]


def _scores(query: Tensor, keys: Tensor) -> Tensor:
    """Return query keys^T in float32. query (B, M, D), keys (B, S, D), result (B, M, S)

    In half precision, large scores would have larger errors than in the learner, whose attention keeps them
    in float32.
    """
    if query.dtype == torch.float32:
        return torch.bmm(query, keys.transpose(1, 2))
    return torch.bmm(query, keys.transpose(1, 2), out_dtype=torch.float32)


def _portions(fresh: dict[int, list[Row]]) -> Iterator[dict[int, list[Row]]]:
    """Yield groups of prompts to compute together, at most `PREFILL_TOKENS` tokens each."""
    some: dict[int, list[Row]] = {}
    tokens = 0
    for slot, group in fresh.items():
        size = len(group[0].prompt_ids)
        if some and tokens + size > PREFILL_TOKENS:
            yield some
            some, tokens = {}, 0
        some[slot] = group
        tokens += size
    if some:
        yield some
