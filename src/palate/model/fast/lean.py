"""Layers of the Llama kind with fewer passes over memory, and less to keep for backward, than their own code.

Beside the matrix products a layer normalises, rotates and gates. Written as single tensor operations, each of
these reads and writes its tensors many times over, and autograd keeps most of what lies between; here each is
one function that knows its derivative and keeps what it was given. Adapters are added onto the products of
the layers that they adapt, in place.

Which models are understood is a list of classes whose code is known; any other network computes itself. That
the numbers are the network's own is tried with every model that is loaded (see `fast`).
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
"""Last hidden states, after the final norm, (B, T, H), of input ids and position ids, int64 (B, T) on any
device, and a layout. To be called within `following(network)`."""

WINDOW: dict[str, Callable[[Any], int | None]] = {
    "Llama": lambda block: None,
    "Mistral": lambda block: block.config.sliding_window,
    "Qwen2": lambda block: block.sliding_window,
    "Qwen3": lambda block: block.sliding_window,
}
"""The kinds that are understood, and where each says how far back a layer sees."""


Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x (M, K), weight (N, K) and bias to x W^T + bias."""


def states_of(network: Any, *, times: Product = linear) -> States:
    """Return a function that computes hidden states of a causal model whose layers follow layouts.

    Args:
        network: the model.
        times: what computes products of layers without an adapter, where they are computed here.
    """
    kind = kind_of(network)
    return partial(_by_itself, network) if kind is None else partial(_through_layers, network, kind, times)


def kind_of(network: Any) -> str | None:
    """Return the kind of a model, or None if the model must compute its layers itself.

    Only if all that is passed over is just what its class says: a hook, or a forward of its own as offloading
    gives a module, must not be.
    """
    model = network.base_model
    kind = type(model).__name__.removesuffix("Model")
    home = f"transformers.models.{kind.lower()}.modeling_{kind.lower()}"
    if kind not in WINDOW or type(model).__module__ != home:
        return None
    called = {id(module) for whole in (model.embed_tokens, model.rotary_emb) for module in whole.modules()}
    ours = all(
        (type(layer).__module__, type(layer).__name__) == (home, f"{kind}DecoderLayer")
        and type(layer.mlp.act_fn) in (nn.SiLU, SiLUActivation)
        for layer in model.layers
    )
    plain = all(not _is_hooked(module) for module in model.modules() if id(module) not in called)
    return kind if ours and plain else None


def _is_hooked(module: nn.Module) -> bool:
    """Return True if calling a module does more than its class says."""
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
    network: Any, kind: str, times: Product, input_ids: Tensor, position_ids: Tensor, layout: Layout
) -> Tensor:
    model = network.base_model
    embedded: Tensor = model.embed_tokens(input_ids.to(network.device))
    cos, sin = (part.unsqueeze(2) for part in model.rotary_emb(embedded, position_ids.to(network.device)))
    hidden = embedded.flatten(0, 1)
    for layer in model.layers[: model.config.num_hidden_layers]:
        computed = partial(
            _layer, layer, WINDOW[kind](layer.self_attn), times, cos=cos, sin=sin, layout=layout
        )
        if layer.training and layer.gradient_checkpointing:
            # Nothing in a layer is random: the settings have dropout at 0.
            hidden = checkpoint(computed, hidden, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = computed(hidden)
    return normalised(hidden, model.norm).view(embedded.shape)


def _layer(
    layer: Any,
    window: int | None,
    times: Product,
    hidden: Tensor,
    *,
    cos: Tensor,
    sin: Tensor,
    layout: Layout,
) -> Tensor:
    """One layer. hidden (B * T, H); cos and sin (B, T, 1, D)."""
    normed = normalised(hidden, layer.input_layernorm)
    hidden = hidden + _attention(layer.self_attn, window, times, normed, cos, sin, layout)
    normed, mlp = normalised(hidden, layer.post_attention_layernorm), layer.mlp
    between = gated(projected(normed, mlp.gate_proj, times), projected(normed, mlp.up_proj, times))
    return hidden + projected(between, mlp.down_proj, times)


def _attention(
    block: Any,
    window: int | None,
    times: Product,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    layout: Layout,
) -> Tensor:
    query, key, value = (
        projected(normed, layer, times).view(*cos.shape[:2], -1, block.head_dim)
        for layer in (block.q_proj, block.k_proj, block.v_proj)
    )
    if hasattr(block, "q_norm"):
        query, key = normalised(query, block.q_norm), normalised(key, block.k_norm)
    found = layout.attend(
        block.layer_idx,
        rotated(query, cos, sin).transpose(1, 2),
        rotated(key, cos, sin).transpose(1, 2),
        value.transpose(1, 2),
        Attention(block.scaling, window, None),
    )
    return projected(found.reshape(len(normed), -1), block.o_proj, times)


# ---- Products --------------------------------------------------------------------------------------


def projected(x: Tensor, layer: Any, times: Product) -> Tensor:
    """A linear layer with its adapter, if it has one, added in place. x (M, K), the result (M, N)."""
    if type(layer) is nn.Linear:
        return times(x, layer.weight, layer.bias)
    if type(layer) is not LoraLinear or not _is_plain(layer):
        found: Tensor = layer(x)
        return found
    base = layer.base_layer
    if layer.disable_adapters:
        return times(x, base.weight, base.bias)
    (adapter,) = layer.active_adapters
    down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return linear(x, base.weight, base.bias).addmm_(linear(x, down), up.t(), alpha=layer.scaling[adapter])


def _is_plain(layer: Any) -> bool:
    """Return True if a LoRA layer is just base + scaling * B A, or the base while it is switched off."""
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
    """RMS norm over the last dimension, in float32 inside. x (..., H)"""
    if not torch.is_grad_enabled():  # a step of sampling has hundreds of these, and `apply` costs as much
        return _normalised(x, norm.weight, norm.variance_epsilon)[0]
    found: Tensor = _Normalised.apply(x, norm.weight, norm.variance_epsilon)  # type: ignore[no-untyped-call]
    return found


def _normalised(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm, and what each vector was multiplied with, (..., 1)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).to(x.dtype).mul_(weight), scale


class _Normalised(torch.autograd.Function):
    """y = w * x r with r = 1 / sqrt(mean(x^2) + eps), rounded before w as the models do.

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
    """Rotary embedding. x (B, T, heads, D); cos and sin (B, T, 1, D), whose two halves are alike."""
    if not torch.is_grad_enabled():
        return _turned(x, cos, sin, 1)
    found: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return found


class _Rotated(torch.autograd.Function):
    """Pairs (x_i, x_{i + D/2}) turned by an angle each; backward turns them back."""

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
    """silu(gate) * up, of equal shapes."""
    if not torch.is_grad_enabled():
        return silu(gate).mul_(up)
    found: Tensor = _Gated.apply(gate, up)  # type: ignore[no-untyped-call]
    return found


class _Gated(torch.autograd.Function):
    """Keeps its two arguments alone and makes silu again in backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(d_out * up, gate)
        return d_gate, silu(gate).mul_(d_out)
