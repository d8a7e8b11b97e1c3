"""Llama-like models for sampling on a CPU: fewer products per layer, with weights packed once per version.

A sampling step has few rows, so each product is short, and the operations around it cost as much. Query, key
and value are one product here, gate and up another, and the adapters of layers with the same input are one
product. The weights are stored in the order in which the processor's kernels read them, so that no product
reorders them. Rows of the query and key weights are sorted so that the two numbers that the rotary embedding
turns are neighbours: the rotation is then one product of complex numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.layout import PackedLayout
from palate.model.fast.lean import WINDOW, is_plain, kind_of
from palate.model.fast.operations import normalised

MOST_BYTES = 2 << 30
"""Largest size of the packed copy. A larger model samples with its own weights."""
ROWS = 64
"""Number of rows that the packed order is chosen for; other numbers work, too."""


Product = Callable[[Tensor], Tensor]
"""Returns x W^T + bias for x (M, K)."""
Packing = Callable[[Tensor, Tensor | None], Product]
"""Returns the product of a weight (N, K) and a bias (N,) or None, in an order of its own."""


def by_torch(weight: Tensor, bias: Tensor | None) -> Product:
    """Pack a weight with torch's library; see `Packing`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    product: Product = lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # noqa: E731
    return product


class Joined:
    """Linear layers with the same input as one product, with their adapters.

    Args:
        layers: linear layers, or LoRA layers that `is_plain` accepts.
        packing: packs their weight.
        order: for each layer, the order of its outputs; None keeps it.

    Attributes:
        outputs: the number of outputs of all layers, N.
    """

    def __init__(
        self, layers: Sequence[Any], packing: Packing, order: Sequence[Tensor | None] | None = None
    ) -> None:
        order = order or [None] * len(layers)
        bases = [layer if type(layer) is nn.Linear else layer.base_layer for layer in layers]
        weight = torch.cat([_sorted(_weight_of(layer), by) for layer, by in zip(layers, order, strict=True)])
        self.outputs = len(weight)
        bias = None
        if any(base.bias is not None for base in bases):
            zero = [weight.new_zeros(base.out_features) for base in bases]
            biases = [base.bias if base.bias is not None else z for base, z in zip(bases, zero, strict=True)]
            bias = torch.cat([_sorted(bias, by) for bias, by in zip(biases, order, strict=True)])
        self._product = packing(weight, bias)
        self._adapters = _adapters(layers, bases, order)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs of all layers, in order. x (M, K), result (M, N)"""
        out = self._product(x)
        if self._adapters is not None:
            down, up = self._adapters
            out.addmm_(linear(x, down), up)
        return out


class Fused:
    """The layers and the head of a network with its current weights, which it copies.

    Args:
        network: a network that `can_fuse` accepts.
        packing: packs the weights.

    Attributes:
        network: the network whose weights these are.
        layers: its layers.
        norm: the norm after them.
    """

    def __init__(self, network: Any, packing: Packing = by_torch) -> None:
        self.network = network
        self._model = network.base_model
        kind = kind_of(network)
        assert kind is not None, "the network computes its layers itself"
        blocks = self._model.layers[: self._model.config.num_hidden_layers]
        self.layers = [Layer(block, WINDOW[kind](block.self_attn), packing) for block in blocks]
        self.norm = self._model.norm
        self._head = Joined([network.get_output_embeddings()], packing)

    def states(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """Return the last hidden states, (B, T, H), as `lean.States`."""
        step = not isinstance(layout, PackedLayout)
        hidden, turns = self.before(input_ids, position_ids, step=step)
        for layer in self.layers:
            hidden = layer(hidden, turns, layout, input_ids.shape)
        return self.after(hidden).view(*input_ids.shape, -1)

    def before(self, input_ids: Tensor, position_ids: Tensor, *, step: bool) -> tuple[Tensor, Tensor]:
        """Return the embeddings (B * T, H), and the rotations, complex (B * T, query and key heads, D / 2).

        The rotations of a step also scale its queries.
        """
        embedded: Tensor = self._model.embed_tokens(input_ids)
        cos, sin = self._model.rotary_emb(embedded, position_ids)
        half = cos.shape[-1] // 2
        turns = torch.complex(cos[..., :half].float(), sin[..., :half].float()).flatten(0, 1)[:, None]
        first = self.layers[0]
        heads = turns.new_ones(first.query_heads + first.key_heads, 1)
        if step:
            heads[: first.query_heads] = first.scaling
        return embedded.flatten(0, 1), turns * heads

    def after(self, hidden: Tensor) -> Tensor:
        """Return the states after the final norm. hidden (M, H)"""
        return normalised(hidden, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the raw logits (M, V), without a soft cap. hidden (M, H)"""
        return self._head(hidden)


class Layer:
    """One layer of a Llama-like model.

    Attributes:
        products: its linear layers with joined inputs: query, key and value; output; gate and up; down.
        before, between: the norms before the attention and before the gate.
        norms: the norms of queries and keys, or two times None.
        index, size, query_heads, key_heads, scaling, window: the options of its attention.
    """

    def __init__(self, block: Any, window: int | None, packing: Packing) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.size, self.index, self.scaling = attention.head_dim, attention.layer_idx, attention.scaling
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.query_heads, self.key_heads, _ = (part.out_features // self.size for part in parts)
        pairs = torch.arange(self.size).view(2, -1).t().flatten()
        starts = torch.arange(self.query_heads)[:, None] * self.size
        order = [(starts + pairs).flatten(), (starts[: self.key_heads] + pairs).flatten(), None]
        self.products = (
            Joined(parts, packing, order),
            Joined([attention.o_proj], packing),
            Joined([mlp.gate_proj, mlp.up_proj], packing),
            Joined([mlp.down_proj], packing),
        )
        self.before, self.between = block.input_layernorm, block.post_attention_layernorm
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.norms = [None if norm is None else _SortedNorm(norm, pairs) for norm in norms]
        self.window = window
        # A step's queries are scaled by the rotation, those of packed prompts by the attention.
        self._scaled, self._unscaled = Attention(1.0, window, None), Attention(self.scaling, window, None)

    def __call__(self, hidden: Tensor, turns: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
        """Compute the layer. hidden (B * T, H); turns (B * T, query and key heads, D / 2); shape B, T."""
        first, output, gate_up, down = self.products
        joined = first(normalised(hidden, self.before))
        count = self.query_heads + self.key_heads
        turned, value = joined[:, : count * self.size], joined[:, count * self.size :]
        turned = turned.view(len(hidden), count, self.size)
        if self.norms[0] is not None:
            parts = turned[:, : self.query_heads], turned[:, self.query_heads :]
            turned = torch.cat([normalised(p, n) for p, n in zip(parts, self.norms, strict=True)], 1)
        turned = turned.float().view(len(hidden), count, -1, 2)
        turned = torch.view_as_real(torch.view_as_complex(turned) * turns).flatten(2)
        step = not isinstance(layout, PackedLayout)
        if not step:
            turned = turned.to(hidden.dtype)
        turned = turned.view(*shape, count, self.size).transpose(1, 2)
        attended = layout.attend(
            self.index,
            turned[:, : self.query_heads],
            turned[:, self.query_heads :],
            value.view(*shape, self.key_heads, self.size).transpose(1, 2),
            self._scaled if step else self._unscaled,
        )
        hidden = hidden + output(attended.to(hidden.dtype).reshape(len(hidden), -1))
        gate, up = gate_up(normalised(hidden, self.between)).chunk(2, -1)
        return hidden + down(silu(gate).mul_(up))


class _SortedNorm:
    """The weights of a norm over the numbers of a head, sorted as these are."""

    def __init__(self, norm: Any, order: Tensor) -> None:
        self.weight, self.variance_epsilon = norm.weight.detach()[order], norm.variance_epsilon


def can_fuse(network: Any) -> bool:
    """Return whether `Fused` can compute with the network: by its kind, device, adapters and size."""
    if kind_of(network) is None or network.device.type != "cpu" or not _packs(network.dtype):
        return False
    head = network.get_output_embeddings()
    model = network.base_model
    layers = [
        layer
        for block in model.layers
        for part in (block.self_attn, block.mlp)
        for name, layer in part.named_children()
        if name.endswith("_proj")
    ]
    plain = all(
        type(layer) is nn.Linear or (type(layer) is LoraLinear and is_plain(layer)) for layer in layers
    )
    weights = [*model.layers.parameters(), *(head.parameters() if type(head) is nn.Linear else ())]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    return plain and type(head) is nn.Linear and size <= MOST_BYTES


def _packs(dtype: torch.dtype) -> bool:
    """Return whether this build of torch and this processor have packed products in a number format."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _adapter_of(layer: Any) -> str | None:
    """Return the name of a layer's adapter; None if it has none or if it is switched off."""
    if type(layer) is nn.Linear or layer.disable_adapters:
        return None
    (adapter,) = layer.active_adapters
    return str(adapter)


def _weight_of(layer: Any) -> Tensor:
    """Return a layer's weight, with its adapter in float32: half precision would round most of it away."""
    weight: Tensor = layer.weight if type(layer) is nn.Linear else layer.base_layer.weight
    adapter = _adapter_of(layer)
    if adapter is None or weight.dtype != torch.float32:
        return weight
    delta: Tensor = layer.get_delta_weight(adapter)
    return weight + delta


def _sorted(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor.detach() if order is None else tensor.detach()[order]


def _adapters(
    layers: Sequence[Any], bases: Sequence[Any], order: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Return the half-precision adapters of layers with the same input: (ranks, K), (ranks, N); or None."""
    downs, ups = [], []
    sizes = [base.out_features for base in bases]
    for i, layer in enumerate(layers):
        adapter = _adapter_of(layer)
        if adapter is None or bases[i].weight.dtype == torch.float32:
            continue
        downs.append(layer.lora_A[adapter].weight.detach())
        own = _sorted(layer.lora_B[adapter].weight * layer.scaling[adapter], order[i]).t()
        ups.append(nn.functional.pad(own, (sum(sizes[:i]), sum(sizes[i + 1 :]))))
    return (torch.cat(downs), torch.cat(ups)) if downs else None
