"""Memory of a run on one device, in bytes, from the sizes of its models."""

from __future__ import annotations

from dataclasses import dataclass

from palate.planning.network import Network

FLOAT32 = 4
MIB = 1 << 20

TILE = 30 * MIB
"""One tile of logits in float32 on a CPU; see `palate.model.fast.head`."""

TILES = 3
"""Tiles that the head holds at a time: logits, probabilities and their derivative."""

PREFILL = 4096
"""Most prompt tokens in one forward pass of sampling."""

HEAD_COPIES = 4
"""Arrays of rows x vocabulary in float32 that drawing a token holds."""


@dataclass(frozen=True)
class Setup:
    """The settings of a run that its memory depends on.

    Attributes:
        network: the sizes of the policy.
        size: bytes of a weight.
        rank: rank of the LoRA adapter; None trains all weights.
        masters: the optimizer keeps float32 copies; False for `masters: live`.
        checkpointing: activations are recomputed.
        on_cpu: the device is a CPU.
        fast: Palate's own code for sampling and training is on.
        reference: the method has a reference that must outlive the first update.
        critics: further trained models on the policy's base: a value function, a reward model.
        others: bytes of models that are only asked: reward models, judges, a writer of prompts.
        tokens: most tokens of a forward and backward pass.
        rows: completions sampled at a time; 0 if the run samples nothing.
        slots: prompts in progress at a time.
        longest_prompt, new_tokens: in tokens.
        devices: devices that share the batch.
        each_step: completions sampled in each step; 0 if sampling does not follow the steps.
    """

    network: Network
    size: int
    rank: int | None
    masters: bool
    checkpointing: bool
    on_cpu: bool
    fast: bool
    reference: bool
    critics: int
    others: int
    tokens: int
    rows: int
    slots: int
    longest_prompt: int
    new_tokens: int
    devices: int = 1
    each_step: int = 0


@dataclass(frozen=True)
class Bytes:
    """Memory of one device, in bytes, by its use.

    Attributes:
        weights: of the policy with its adapter, and of the value function or reward model in training.
        mapped: of the model's file, whose pages stay in memory on a CPU after loading.
        reference: of a copy of the policy before training; 0 if switching the adapter off gives it.
        others: of models that are only asked.
        masters, gradients, optimizer: the optimizer's copies, the gradients and the two moments.
        merged: of the weights with the adapter merged, for sampling.
        activations: kept for the backward pass, with the tiles of the head.
        cache: keys and values while sampling, with the arrays of the tokens' probabilities.
    """

    weights: int
    mapped: int
    reference: int
    others: int
    masters: int
    gradients: int
    optimizer: int
    merged: int
    activations: int
    cache: int

    @property
    def resident(self) -> int:
        """Bytes that stay for the whole run."""
        kept = (self.weights, self.mapped, self.reference, self.others, self.masters, self.optimizer)
        return sum(kept) + self.merged

    @property
    def peak(self) -> int:
        """The most at a time: sampling and training take turns."""
        return self.resident + max(self.cache, self.gradients + self.activations)


def memory_of(setup: Setup, *, sharded: bool = False, per_token: float | None = None) -> Bytes:
    """Return the memory of one device.

    Args:
        setup: the run's settings.
        sharded: weights, gradients and optimizer are divided among the devices, as FSDP does.
        per_token: activations in bytes per token, if they are known by measurement.
    """
    net, learners = setup.network, 1 + setup.critics
    parts = setup.devices if sharded else 1
    trained = net.parameters if setup.rank is None else net.adapter(setup.rank)
    copies = learners if setup.rank is None else 1
    adapters = 0 if setup.rank is None else learners * trained
    wide = FLOAT32 if setup.masters else setup.size
    has_masters = setup.masters and setup.size < FLOAT32
    merges = setup.rank is not None and setup.size == FLOAT32 and setup.rows and setup.fast
    each = activations_per_token(setup) if per_token is None else per_token
    return Bytes(
        weights=(copies * net.parameters + adapters) * setup.size // parts,
        mapped=net.parameters * setup.size if setup.on_cpu else 0,
        reference=net.parameters * setup.size // parts if setup.reference and setup.rank is None else 0,
        others=setup.others,
        masters=learners * trained * FLOAT32 // parts if has_masters else 0,
        gradients=trained * wide // parts,
        optimizer=2 * learners * trained * wide // parts,
        merged=net.in_products * setup.size if merges else 0,
        activations=int(setup.tokens * each) + _head(setup),
        cache=_cache(setup),
    )


def activations_per_token(setup: Setup) -> float:
    """Return the bytes per token that a forward pass keeps for the backward pass, the head excluded.

    A layer of Palate's own code keeps the input of both norms, query, key and value, the attention's output
    twice, and the two arguments of the gate. With checkpointing, it keeps its input, and the arrays of one
    layer at a time. The code of transformers keeps more, in float32 too.
    """
    net = setup.network
    width, narrow = net.heads * net.head_size, net.kv_heads * net.head_size
    layer = 2 * net.hidden + 3 * width + 3 * narrow + 2 * net.intermediate + (setup.rank or 0)
    layer_bytes = layer * setup.size
    if not (net.lean and setup.fast):
        more = 2 * net.hidden + 2 * net.intermediate + 6 * (setup.rank or 0)
        layer_bytes += (4 * net.hidden + 2 * width) * FLOAT32 + more * setup.size
    if setup.checkpointing:
        return net.layers * net.hidden * setup.size + layer_bytes
    return net.layers * layer_bytes


def _head(setup: Setup) -> int:
    """The tiles of the head, and the derivative of each token's hidden state."""
    net = setup.network
    if not setup.fast:
        return TILES * setup.tokens * net.vocabulary * FLOAT32
    tile = TILE if setup.on_cpu else 8 * TILE
    trained = net.head * setup.size if setup.rank is None else 0
    return TILES * min(tile, setup.tokens * net.vocabulary * FLOAT32) + trained


def _cache(setup: Setup) -> int:
    """Keys and values of prompts and rows, the states of a prompt's pass, and the tokens' probabilities."""
    if not setup.rows:
        return 0
    net = setup.network
    narrow = net.kv_heads * net.head_size
    pair = (FLOAT32 if setup.on_cpu else setup.size) + setup.size  # keys, and values
    positions = setup.slots * setup.longest_prompt + setup.rows * setup.new_tokens
    if not setup.fast:  # every row has its prompt's keys
        positions = setup.rows * (setup.longest_prompt + setup.new_tokens)
    prefill = min(PREFILL, setup.slots * setup.longest_prompt)
    states = prefill * (4 * net.hidden + 2 * net.heads * net.head_size + 3 * net.intermediate) * setup.size
    drawing = HEAD_COPIES * setup.rows * net.vocabulary * FLOAT32
    return net.layers * narrow * positions * pair + max(states, drawing)
