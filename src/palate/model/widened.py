"""Products of bfloat16 on a processor without units for it: in float32, with all else kept as it is.

Without such units PyTorch's own products of bfloat16 run at a fraction of float32's rate. Here weights are
widened block by block into a buffer that the caches hold, so that a bfloat16 model takes half the memory of a
float32 one and nearly none of its speed. A product of two bfloat16 numbers is exact in float32, and so the
result is what those units give: rounded once, at the end.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BLOCK_ELEMENTS = 1 << 21
"""Elements of a weight that are widened at a time: 8 MiB in float32."""
FEW_ROWS = 128
"""Rows up to which, in float32 on a CPU, `W x^T` is the faster of the two ways to a product."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products of bfloat16 by units of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def widens(tensor: Tensor) -> bool:
    """Whether products with this tensor are better computed in float32."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not has_bfloat16(tensor.device)


def widening(network: Any) -> AbstractContextManager[Any]:
    """Within it, products of a network that `widens` are computed in float32; those of backward follow.

    What is checkpointed needs `recomputing` beside it.
    """
    return _Widening() if widens(next(network.parameters())) else nullcontext()


def recomputing(network: Any) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Contexts of a checkpointed layer's forward and of its recomputation, which runs outside of `widening`:
    no mode reaches into backward.
    """
    return nullcontext(), widening(network)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias of bfloat16 tensors. x (..., K), weight (N, K), the result (..., N)."""
    flat = x.reshape(-1, x.shape[-1])
    arguments = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
        found: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        found = times(flat, weight, bias, x.dtype).contiguous()
    return found.view(*x.shape[:-1], len(weight))


def times(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in the format asked for, without gradient.

    x (M, K), weight (N, K), the result (M, N) with any strides.
    """
    wide, few = x.float(), len(x) <= FEW_ROWS
    out = wide.new_empty((len(weight), len(x)) if few else (len(x), len(weight)), dtype=dtype)
    for rows, block in _blocks(weight):
        found = block @ wide.t() if few else wide @ block.t()
        if bias is not None:
            found += bias[rows, None] if few else bias[rows]
        out[rows if few else (slice(None), rows)] = found
    return out.t() if few else out


def through(slope: Tensor, weight: Tensor) -> Tensor:
    """slope W in float32, without gradient. slope (M, N), weight (N, K), the result (M, K)."""
    slope = slope.float()
    out = slope.new_zeros(len(slope), weight.shape[1])
    for rows, block in _blocks(weight):
        out.addmm_(slope[:, rows], block)
    return out


_buffers = threading.local()


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight after the other, in float32. A block is overwritten by the next."""
    if not hasattr(_buffers, "kept"):
        _buffers.kept = torch.empty(BLOCK_ELEMENTS)
    count, width = weight.shape
    size = max(1, BLOCK_ELEMENTS // width)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count))
        elements = (rows.stop - rows.start) * width
        kept = _buffers.kept if elements <= BLOCK_ELEMENTS else torch.empty(elements)
        yield rows, kept[:elements].view(-1, width).copy_(weight[rows])


class _Linear(torch.autograd.Function):
    """dx = dy W, dW = dy^T x, db = sum of dy; x (M, K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        found = times(x, weight, bias, x.dtype)
        # No view of anything: whoever adds to it in place must be allowed to.
        return found.clone(memory_format=torch.contiguous_format) if found._is_view() else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        slope = d_out.float()
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = through(slope, weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            d_weight = (slope.t() @ x.float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = slope.sum(0).to(weight.dtype)
        return d_x, d_weight, d_bias


# ---- Products that others write ----------------------------------------------------------------------


class _Widening(TorchFunctionMode):
    """Takes the place of products that a model's own code asks for, where an argument is bfloat16."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = INSTEAD.get(func)
        if instead is None or not _is_narrow(args[0] if args else None):
            return func(*args, **kwargs)
        return instead(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"


def _wide(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value


def _in_float32(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same of widened arguments, rounded at the end; autograd goes through the conversions."""

    def widened(*args: Any, **kwargs: Any) -> Tensor:
        found = func(*map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()})
        return found.to(torch.bfloat16)

    return widened


def _in_place(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation that overwrites its first argument, from the one that does not."""
    widened = _in_float32(func)

    def overwriting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_(widened(self, *args, **kwargs))

    return overwriting


_PLAIN: tuple[Any, ...] = (
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
    scaled_dot_product_attention,
)
INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: linear,
    **{func: _in_float32(func) for func in _PLAIN},
    Tensor.addmm_: _in_place(torch.addmm),
    Tensor.baddbmm_: _in_place(torch.baddbmm),
}
"""What is computed instead of what."""
