"""Attention of a packed row in one kernel, for GPUs: PyTorch's flex attention and a mask sparse by blocks.

Going from segment to segment suits a CPU; on a GPU, starting so many kernels takes longer than running them.
Here one kernel passes over the row and skips the blocks of which nothing is seen. It is compiled when it is
first used, and believed once its numbers and gradients were those of the segments.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad

from palate.model.attention import Attention
from palate.model.segments import Segments, Shape

log = logging.getLogger("palate")

BLOCK = 128
"""Queries, and keys, of a block of the mask."""

HALF = (torch.bfloat16, torch.float16)
"""Formats in which the kernel is used: in float32 its tiles do not fit every GPU."""


class Blocks:
    """As `Segments`, in one kernel.

    Args:
        records: per record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.records = records
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """query (1, heads, L, D), key and value (1, kv heads, L, D); the output is (1, L, heads, D)."""
        if how.window not in self._masks:
            self._masks[how.window] = block_mask(self.records, how.window, query.device)
        length, softcap = query.shape[2], how.softcap
        filling = (0, 0, 0, _filled(length) - length)

        def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return softcap * torch.tanh(score / softcap)  # type: ignore[operator]

        found: Tensor = compiled()(
            *(pad(t, filling) for t in (query, key, value)),
            score_mod=None if softcap is None else capped,
            block_mask=self._masks[how.window],
            scale=how.scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return found.narrow(2, 0, length).transpose(1, 2)


@cache
def compiled() -> Any:
    """The kernel."""
    # Every kind of layer, with and without gradient, is compiled for one length and then for any.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    # Whole or not at all: where compiling is given up half way, the scores of all pairs of tokens are made.
    return torch.compile(flex_attention, fullgraph=True)


def block_mask(records: Shape, window: int | None, device: torch.device) -> BlockMask:
    """What each token of a packed row sees: its record's prompt and its own segment, up to itself.

    Args:
        records: per record, the length of its prompt and of each completion.
        window: how many positions back a token sees, itself included; None is all.
        device: where the tokens are.
    """
    tables = _tables(records).to(device)
    prompt_from, prompt_to, own_from, position = tables
    length = tables.shape[1]
    # A tensor, since the kernel would be compiled anew for every number that is not one.
    reach = torch.tensor(length if window is None else window, device=device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= own_from[query]) & (key <= query)
        prompt = (key >= prompt_from[query]) & (key < prompt_to[query])
        near = position[query] - position[key] < reach
        seen: Tensor = (own | prompt) & near
        return seen

    return create_block_mask(sees, None, None, length, length, device=device, BLOCK_SIZE=BLOCK)


def _filled(length: int) -> int:
    """The length of a row that is filled up to whole blocks, two at least: for one it would compile anew."""
    return BLOCK * max(2, -(-length // BLOCK))


def _tables(records: Shape) -> Tensor:
    """Of each token: where the prompt that it sees begins and ends, where its own segment begins, and its
    position. int64 (4, L), with L in whole blocks; a token that is there to fill one sees itself alone.
    """
    parts: list[tuple[int, int, int, int]] = []
    begin = 0
    for prompt, completions in records:
        parts.append((prompt, begin, begin, begin))
        ends = list(accumulate(completions, initial=begin + prompt))
        parts += [(end - start, begin, begin + prompt, start) for start, end in pairwise(ends)]
        begin = ends[-1]
    sizes, *starts = (torch.tensor(column) for column in zip(*parts, strict=True))
    filling = torch.arange(begin, _filled(begin))
    prompt_from, prompt_to, own_from = (torch.cat((s.repeat_interleave(sizes), filling)) for s in starts)
    # A completion's positions go on from its prompt's end.
    position = torch.arange(len(own_from)) - own_from + prompt_to - prompt_from
    return torch.stack((prompt_from, prompt_to, own_from, position))


# ---- Whether to believe it -------------------------------------------------------------------------

TRIALS: tuple[Shape, ...] = (((150, (40, 70)), (3, (1, 9))), ((30, (100, 5, 60)), (260, (20,))), ((9, (2,)),))
"""Rows on which a kernel is tried, of unlike lengths, so that one for any length is made there and then."""

CLOSE = 0.03
"""Relative distance at which half-precision results still are the same."""


def trusted(query: Tensor, key: Tensor, how: Attention) -> bool:
    """Whether to use the kernel for such tensors: on a GPU, in half precision, if it is right there."""
    if query.device.type != "cuda" or query.dtype not in HALF:
        return False
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
    return _tried(query.device, query.dtype, heads, kv_heads, size, how.scaling, how.window, how.softcap)


@cache
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> bool:
    how = Attention(scaling, window, softcap)
    try:
        far = [_distance(records, device, dtype, heads, kv_heads, size, how) for records in TRIALS]
        why = None if all(one <= CLOSE for one in far) else f"its results are off by {max(far):.1%}"
    except (RuntimeError, ValueError, NotImplementedError) as error:  # no compiler, too large a tile, ...
        why = f"{type(error).__name__}: {str(error)[:80]}"
    if why is not None:
        log.warning(
            "attention goes from segment to segment, which is slower, since flex attention fails: %s", why
        )
    return why is None


@torch.enable_grad()
def _distance(
    records: Shape,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    how: Attention,
) -> float:
    """How far the kernel's output and gradients are from the segments', relative to their size."""
    generator = torch.Generator().manual_seed(0)
    length = sum(prompt + sum(sizes) for prompt, sizes in records)
    shapes = [(1, count, length, size) for count in (heads, kv_heads, kv_heads)]
    query, key, value = given = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes
    ]
    slope = torch.randn(1, length, heads, size, generator=generator).to(device, dtype)
    results: list[tuple[Tensor, ...]] = []
    for way in (Segments(records), Blocks(records)):
        found = way.attend(query, key, value, how)
        results.append((found.detach(), *torch.autograd.grad(found, given, slope)))
    # The maximum of a tensor, unlike that of a list, is not a number where one of them is not.
    return float(torch.stack([(b - a).norm() / a.norm() for a, b in zip(*results, strict=True)]).max())
