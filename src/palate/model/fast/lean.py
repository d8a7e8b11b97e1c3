"""Layers of Llama-like models with fewer passes over memory and less to save for backward.

The layers' products are torch's; what lies between them is in `operations`. Adapters are added in place to
the products of their layers.

`WINDOW` lists the model classes whose code is known; any other network computes its layers itself. Each
loaded model is tested for the same results as the network's own code (see `probe`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from palate.model.fast.attention import Attention, Layout
from palate.model.fast.maps import Map
from palate.model.fast.operations import Operations, gated, mlp, normed_products, product

States = Callable[[Tensor, Tensor, Layout], Tensor]
"""Returns the last hidden states (B, T, H), after the final norm, from input ids and position ids, int64
(B, T) on any device, and a layout. Call it within `following(network)`."""

WINDOW: dict[str, Callable[[Any], int | None]] = {
    "Llama": lambda block: None,
    "Mistral": lambda block: block.config.sliding_window,
    "Qwen2": lambda block: block.sliding_window,
    "Qwen3": lambda block: block.sliding_window,
}
"""The supported kinds of models, with a function that returns a layer's sliding window."""


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Returns x W^T + bias for x (M, K), weight (N, K) and bias."""


def states_of(network: Any, *, times: Product = linear, operations: Operations | None = None) -> States:
    """Return a function that computes hidden states of a causal model whose layers follow layouts.

    Args:
        network: the model.
        times: computes the products of layers without an adapter, if this module computes the layers.
        operations: computes what lies between the products; by default in plain torch.
    """
    kind = kind_of(network)
    if kind is None:
        return partial(_by_itself, network)
    return partial(_through_layers, network, kind, times, operations or Operations())


def kind_of(network: Any) -> str | None:
    """Return the kind of a model, or None if the model must compute its layers itself.

    A kind is returned only if all bypassed modules are exactly as in their class: without hooks, and without
    a replaced forward, which offloading uses.
    """
    model = network.base_model
    kind = type(model).__name__.removesuffix("Model")
    home = f"transformers.models.{kind.lower()}.modeling_{kind.lower()}"
    if kind not in WINDOW or type(model).__module__ != home:
        return None
    called = {id(module) for root in (model.embed_tokens, model.rotary_emb) for module in root.modules()}
    known = all(
        (type(layer).__module__, type(layer).__name__) == (home, f"{kind}DecoderLayer")
        and type(layer.mlp.act_fn) in (nn.SiLU, SiLUActivation)
        for layer in model.layers
    )
    plain = all(not _is_hooked(module) for module in model.modules() if id(module) not in called)
    return kind if known and plain else None


def _is_hooked(module: nn.Module) -> bool:
    """Return whether calling a module runs code outside its class."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks) or "forward" in vars(module)


def _by_itself(network: Any, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
    hidden: Tensor = network.base_model(
        input_ids=input_ids.to(network.device),
        position_ids=position_ids.to(network.device),
        use_cache=False,
        palate_layout=layout,
    ).last_hidden_state
    return hidden


def _through_layers(
    network: Any,
    kind: str,
    times: Product,
    operations: Operations,
    input_ids: Tensor,
    position_ids: Tensor,
    layout: Layout,
) -> Tensor:
    model = network.base_model
    embedded: Tensor = model.embed_tokens(input_ids.to(network.device))
    cos, sin = (part.unsqueeze(2) for part in model.rotary_emb(embedded, position_ids.to(network.device)))
    angles = operations.angles(cos, sin)
    hidden, change = embedded.flatten(0, 1), None
    for layer in model.layers[: model.config.num_hidden_layers]:
        window = WINDOW[kind](layer.self_attn)
        computed = partial(layer_states, layer, window, times, operations, angles=angles, layout=layout)
        if layer.training and layer.gradient_checkpointing:
            # Only the sum is kept. Layers have no randomness, since dropout is 0.
            hidden = hidden if change is None else hidden + change
            hidden, change = checkpoint(computed, hidden, None, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden, change = computed(hidden, change)
    return normed_products(operations, hidden, change, model.norm, ())[1].view(embedded.shape)


def layer_states(
    layer: Any,
    window: int | None,
    times: Product,
    operations: Operations,
    hidden: Tensor,
    change: Tensor | None,
    *,
    angles: tuple[Tensor, Tensor],
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Compute one layer from the hidden states and a change that is not yet added; return the same two.

    hidden, change (B * T, H); angles (B, T, 1, D)
    """
    block, feed = layer.self_attn, layer.mlp
    hidden, *parts = _normed(
        operations, hidden, change, layer.input_layernorm, (block.q_proj, block.k_proj, block.v_proj), times
    )
    output = _attention(block, window, operations, parts, angles, layout).reshape(len(hidden), -1)
    one = map_of(block.o_proj, times)
    change = projected(output, block.o_proj, times) if one is None else product(operations, output, one)
    maps = [map_of(part, times) for part in (feed.gate_proj, feed.up_proj, feed.down_proj)]
    known = [one for one in maps if one is not None]
    norm = layer.post_attention_layernorm
    if len(known) == len(maps):
        return mlp(operations, hidden, change, norm, known)
    hidden, gate, up = _normed(operations, hidden, change, norm, (feed.gate_proj, feed.up_proj), times)
    return hidden, projected(gated(operations, gate, up), feed.down_proj, times)


def _attention(
    block: Any,
    window: int | None,
    operations: Operations,
    parts: Sequence[Tensor],
    angles: tuple[Tensor, Tensor],
    layout: Layout,
) -> Tensor:
    query, key, value = (part.view(*angles[0].shape[:2], -1, block.head_dim) for part in parts)
    if hasattr(block, "q_norm"):
        query, key = (
            normed_products(operations, part, None, norm, ())[1]
            for part, norm in ((query, block.q_norm), (key, block.k_norm))
        )
    how = Attention(block.scaling, window, None)
    return operations.attend(layout, block.layer_idx, query, key, value, how, angles)


# ---- Products --------------------------------------------------------------------------------------


def map_of(layer: Any, times: Product) -> Map | None:
    """Return a linear layer, with its adapter if it has one, as a map; None if it computes itself."""
    if times is not linear:
        return None
    if type(layer) is nn.Linear:
        return Map(layer.weight, layer.bias)
    if type(layer) is not LoraLinear or not is_plain(layer):
        return None
    base = layer.base_layer
    if layer.disable_adapters:
        return Map(base.weight, base.bias)
    (adapter,) = layer.active_adapters
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return Map(base.weight, base.bias, down, up, layer.scaling[adapter])


def _normed(
    operations: Operations,
    hidden: Tensor,
    change: Tensor | None,
    norm: Any,
    layers: Sequence[Any],
    times: Product,
) -> tuple[Tensor, ...]:
    """Return hidden + change, and each layer of its norm."""
    maps = [map_of(layer, times) for layer in layers]
    known = [one for one in maps if one is not None]
    if len(known) == len(layers):
        return normed_products(operations, hidden, change, norm, known)
    hidden, normed = normed_products(operations, hidden, change, norm, ())
    return hidden, *(projected(normed, layer, times) for layer in layers)


def projected(x: Tensor, layer: Any, times: Product) -> Tensor:
    """Apply a linear layer, with its adapter if it has one. x (M, K), result (M, N)."""
    if type(layer) is nn.Linear:
        return times(x, layer.weight, layer.bias)
    if type(layer) is LoraLinear and layer.disable_adapters and is_plain(layer):
        return times(x, layer.base_layer.weight, layer.base_layer.bias)
    one = map_of(layer, linear)
    output: Tensor = layer(x) if one is None else one(x)
    return output


def is_plain(layer: Any) -> bool:
    """Return whether a LoRA layer is exactly base + scaling * B A, or the base while it is switched off."""
    if type(layer.base_layer) is not nn.Linear or layer.merged:
        return False
    if layer.disable_adapters:
        return True
    if len(layer.active_adapters) != 1:
        return False
    (adapter,) = layer.active_adapters
    return (
        adapter in layer.lora_A
        and adapter not in layer.lora_variant
        and layer.lora_B[adapter].bias is None
        and layer.lora_A[adapter].weight.dtype == layer.base_layer.weight.dtype
    )
