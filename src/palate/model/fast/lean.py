"""Layers of Llama-like models with fewer passes over memory and less to save for backward.

Besides matrix products, a layer normalises, rotates and gates. As separate tensor operations, each of these
reads and writes its tensors many times, and autograd saves most intermediate results. Here each is one
function with an explicit derivative that saves only its inputs. Adapters are added in place to the products
of their layers.

`WINDOW` lists the model classes whose code is known; any other network computes its layers itself. Each
loaded model is tested for the same results as the network's own code (see `probe`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint
from transformers.activations import SiLUActivation

from palate.model.fast.attention import Attention, Layout

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
    hidden = embedded.flatten(0, 1)
    for layer in model.layers[: model.config.num_hidden_layers]:
        window = WINDOW[kind](layer.self_attn)
        computed = partial(layer_states, layer, window, times, operations, angles=angles, layout=layout)
        if layer.training and layer.gradient_checkpointing:
            # Layers have no randomness, since dropout is 0.
            hidden = checkpoint(computed, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = computed(hidden)
    return operations.normalised(hidden, model.norm).view(embedded.shape)


def layer_states(
    layer: Any,
    window: int | None,
    times: Product,
    operations: Operations,
    hidden: Tensor,
    *,
    angles: tuple[Tensor, Tensor],
    layout: Layout,
) -> Tensor:
    """Compute one layer. hidden (B * T, H); angles (B, T, 1, D)."""
    normed = operations.normalised(hidden, layer.input_layernorm)
    change = _attention(layer.self_attn, window, times, operations, normed, angles, layout)
    hidden, normed = operations.added(hidden, change, layer.post_attention_layernorm)
    mlp = layer.mlp
    between = operations.gated(projected(normed, mlp.gate_proj, times), projected(normed, mlp.up_proj, times))
    return hidden + projected(between, mlp.down_proj, times)


def _attention(
    block: Any,
    window: int | None,
    times: Product,
    operations: Operations,
    normed: Tensor,
    angles: tuple[Tensor, Tensor],
    layout: Layout,
) -> Tensor:
    query, key, value = (
        projected(normed, layer, times).view(*angles[0].shape[:2], -1, block.head_dim)
        for layer in (block.q_proj, block.k_proj, block.v_proj)
    )
    if hasattr(block, "q_norm"):
        query, key = operations.normalised(query, block.q_norm), operations.normalised(key, block.k_norm)
    output = operations.attend(
        layout,
        block.layer_idx,
        operations.rotated(query, *angles),
        operations.rotated(key, *angles),
        value,
        Attention(block.scaling, window, None),
    )
    return projected(output.reshape(len(normed), -1), block.o_proj, times)


class Operations:
    """What a layer computes between its products, in plain torch."""

    def angles(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Return the angles of all layers as `rotated` reads them. (B, T, 1, D)"""
        return cos, sin

    def normalised(self, x: Tensor, norm: Any) -> Tensor:
        """Return the RMS norm over the last dimension. x (..., H)"""
        return normalised(x, norm)

    def added(self, hidden: Tensor, change: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm. (M, H)"""
        hidden = hidden + change
        return hidden, normalised(hidden, norm)

    def rotated(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the rotated queries or keys. x (B, T, heads, D)"""
        return rotated(x, cos, sin)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return silu(gate) * up."""
        return gated(gate, up)

    def attend(
        self, layout: Layout, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention
    ) -> Tensor:
        """Return the attention of a layer. All (B, T, heads, D), with fewer heads of keys and values."""
        return layout.attend(layer, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), how)


# ---- Products --------------------------------------------------------------------------------------


def projected(x: Tensor, layer: Any, times: Product) -> Tensor:
    """Apply a linear layer, with its adapter if it has one. x (M, K), result (M, N)."""
    if type(layer) is nn.Linear:
        return times(x, layer.weight, layer.bias)
    if type(layer) is not LoraLinear or not is_plain(layer):
        output: Tensor = layer(x)
        return output
    base = layer.base_layer
    if layer.disable_adapters:
        return times(x, base.weight, base.bias)
    (adapter,) = layer.active_adapters
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return linear(x, base.weight, base.bias).addmm_(linear(x, down), up.t(), alpha=layer.scaling[adapter])


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


# ---- Norm, rotation, gate --------------------------------------------------------------------------


def normalised(x: Tensor, norm: Any) -> Tensor:
    """Return the RMS norm over the last dimension, computed in float32. x (..., H)"""
    if not torch.is_grad_enabled():  # sampling calls this hundreds of times per step; `apply` is costly
        return _normalised(x, norm.weight, norm.variance_epsilon)[0]
    output: Tensor = _Normalised.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return output


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm and the factor of each vector, (..., 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight), scale


class _Normalised(torch.autograd.Function):
    """y = w * x r with r = 1 / sqrt(mean(x^2) + eps), rounded before the product with w as in the models.

    With g = w * dy: dx = r g - x r^3 mean(g x), dw = sum of dy * x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normalised(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (d_out * (x * scale)).flatten(0, -2).sum(0).to(weight.dtype)
        slope = (d_out * weight).to(scale.dtype)
        along = (slope * x).sum(-1, keepdim=True).mul_(scale**3).div_(x.shape[-1])
        d_x = slope.mul_(scale).addcmul_(x, along, value=-1)
        return d_x.to(x.dtype), d_weight, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding. x (B, T, heads, D); cos and sin (B, T, 1, D) with two equal halves."""
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin, 1)
    output: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return output


class _Rotated(torch.autograd.Function):
    """The rotation of each pair (x_i, x_{i + D/2}) by its angle; backward rotates by the negative angle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(d_out, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    half = sin[..., : first.shape[-1]]
    left, right = out.chunk(2, dim=-1)
    left.addcmul_(second, half, value=-sign)
    right.addcmul_(first, half, value=sign)
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, for equal shapes."""
    if not torch.is_grad_enabled():
        return silu(gate).mul_(up)
    output: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return output


class _Gated(torch.autograd.Function):
    """The gate; saves only its two arguments and recomputes silu in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate)
        return d_gate, silu(gate).mul_(d_out)
