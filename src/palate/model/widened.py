"""Products of bfloat16 on an x86 processor without units for it: in float32, with all else kept as it is.

Without such units PyTorch's own products of bfloat16 run at a fraction of float32's rate. Here weights are
widened block by block into a buffer that the caches hold, so that a bfloat16 model has nearly a float32 one's
speed and half its weights' memory. As with such units, products are exact, sums are float32, and the result
is rounded once.
"""

from __future__ import annotations

import platform
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
"""Elements of a weight, or of a result, that are in work at a time: 8 MiB in float32."""
FEW_ROWS = 128
"""Rows up to which, in float32 on a CPU, `W x^T` is the faster of the two ways to a product."""


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes products of bfloat16 by units of its own."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def lacks_units(device: torch.device) -> bool:
    """Whether float32 is the faster way to products of bfloat16. Found on x86, and believed there alone."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return device.type == "cpu" and on_x86 and not has_bfloat16(device)


def widens(tensor: Tensor) -> bool:
    """Whether products with this tensor are better computed in float32."""
    return tensor.dtype == torch.bfloat16 and lacks_units(tensor.device)


def widening(network: Any) -> AbstractContextManager[Any]:
    """Within it, products of a network that `widens` are computed in float32; those of backward follow.

    What is checkpointed needs `checkpoint_options` beside it.
    """
    return _Widening() if widens(next(network.parameters())) else nullcontext()


def checkpoint_options(network: Any) -> dict[str, Any]:
    """What torch's `checkpoint` of a network's layers needs: no mode reaches into backward, where they are
    computed again, so each pass opens its own.
    """
    return {"context_fn": _both_passes} if widens(next(network.parameters())) else {}


def _both_passes() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return _Widening(), _Widening()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias of bfloat16 tensors. x (..., K), weight (N, K), the result (..., N)."""
    if weight.dim() != 2:
        return torch.nn.functional.linear(x, weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    arguments = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in arguments):
        found: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:
        found = times(flat, weight, bias, x.dtype).contiguous()
    return found if x.dim() == 2 else found.view(*x.shape[:-1], len(weight))


def times(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias in the format asked for, without gradient.

    x (M, K), weight (N, K), the result (M, N) with any strides.
    """
    wide, few = x.detach().float(), len(x) <= FEW_ROWS
    out = wide.new_empty((len(weight), len(x)) if few else (len(x), len(weight)), dtype=dtype)
    for rows, block in _blocks(weight, len(x)):
        found = block @ wide.t() if few else wide @ block.t()
        if bias is not None:
            found += bias.detach()[rows, None] if few else bias.detach()[rows]
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


def _blocks(weight: Tensor, tokens: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a weight after the other, in float32. A block is overwritten by the next.

    Their product with so many tokens, too, is no larger than a block.
    """
    if not hasattr(_buffers, "kept"):
        with torch.inference_mode(False):  # else whoever comes later could not write to it
            _buffers.kept = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device="cpu")
    width = weight.shape[1]
    for rows in _slices(len(weight), max(1, BLOCK_ELEMENTS // max(width, tokens))):
        elements = (rows.stop - rows.start) * width
        kept = _buffers.kept if elements <= BLOCK_ELEMENTS else torch.empty(elements, dtype=torch.float32)
        yield rows, kept[:elements].view(-1, width).copy_(weight.detach()[rows])


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Linear(torch.autograd.Function):
    """dx = dy W, dW = dy^T x, db = sum of dy; x (M, K)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
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
            d_x = through(slope, weight).to(d_out.dtype)
        if ctx.needs_input_grad[1]:
            wide = x.float()
            d_weight = x.new_empty(slope.shape[1], x.shape[1])
            for rows in _slices(len(d_weight), max(1, BLOCK_ELEMENTS // x.shape[1])):
                d_weight[rows] = slope[:, rows].t() @ wide
        if ctx.needs_input_grad[2]:
            d_bias = slope.sum(0).to(d_out.dtype)
        return d_x, d_weight, d_bias


# ---- Products that others write ----------------------------------------------------------------------


class _Widening(TorchFunctionMode):
    """Takes the place of products of bfloat16 that a model's own code asks for, by the names in `INSTEAD`.

    What goes by another name (einsum, convolutions, products of grouped experts), or writes to `out`, is left
    to PyTorch: right, and slow.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        instead = INSTEAD.get(func)
        if instead is None or kwargs.keys() & _ASKED:
            return func(*args, **kwargs)
        factors = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        return (instead if factors and all(map(_is_narrow, factors)) else func)(*args, **kwargs)


_ASKED = {"out", "out_dtype"}
"""Arguments of those who want the result elsewhere, or in a format of their choice."""


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


def _addmm(add: Tensor, x: Tensor, matrix: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """add + x matrix, which is how GPT-2 writes a linear layer."""
    if add.dim() == 1 and beta == alpha == 1 and len(add) == matrix.shape[1]:
        return linear(x, matrix.t(), add)
    return _in_float32(torch.addmm)(add, x, matrix, beta=beta, alpha=alpha)


def _in_place(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An operation that overwrites its first argument, from the one that does not."""
    widened = _in_float32(func)

    def overwriting(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.copy_(widened(self, *args, **kwargs))

    return overwriting


_PLAIN: tuple[Any, ...] = (
    *(torch.matmul, torch.mm, torch.bmm, torch.baddbmm),
    *(Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.baddbmm),
    scaled_dot_product_attention,
)
INSTEAD: dict[Any, Callable[..., Tensor]] = {
    torch.nn.functional.linear: linear,
    **{func: _in_float32(func) for func in _PLAIN},
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    Tensor.addmm_: _in_place(torch.addmm),
    Tensor.baddbmm_: _in_place(torch.baddbmm),
}
"""What is computed instead of what."""
