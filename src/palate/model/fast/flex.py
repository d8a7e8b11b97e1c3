"""Attention of a packed row in one kernel, for GPUs: PyTorch's flex attention with a block-sparse mask.

Attention segment by segment suits a CPU; on a GPU, starting so many kernels takes longer than running them.
Here one kernel processes the row and skips blocks without a visible key. It is compiled on first use, and
used only if its results and gradients equal those of the segments.

It is experimental, since it has only run uncompiled, on a CPU. So it is off unless `SWITCH` is 1 in the
environment.
"""

from __future__ import annotations

import logging
import math
import os
from functools import cache
from itertools import accumulate, pairwise
from subprocess import SubprocessError
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from palate.model.fast.attention import Attention
from palate.model.fast.segments import Segments, Shape

log = logging.getLogger("palate")

SWITCH = "PALATE_FLEX"
"""The environment variable that switches the kernel on."""

BLOCK = 128
"""Number of queries, and of keys, in a block of the mask."""

FEW_SEGMENTS = 8
"""Number of segments from which the kernel is used; a mask costs as much as dozens of small kernels (an
estimate)."""

HALF = (torch.bfloat16, torch.float16)
"""Number formats for which the kernel is used; in float32 its tiles do not fit every GPU."""


COMPILING = {"recompile_limit": 64, "specialize_float": True}
"""Options of the compiler. Each kind of layer, with and without gradient, is compiled for one length and then
for any length. Scaling and soft cap are constants, since they do not compile as variables."""


class Blocks:
    """The attention of `Segments` in one kernel; queries, keys and values are padded to whole blocks.

    Args:
        records: for each record, the length of its prompt and of each completion.
    """

    def __init__(self, records: Shape) -> None:
        self.records = records
        self._masks: dict[int | None, BlockMask] = {}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """Compute attention. query (1, heads, L, D), key and value (1, kv heads, L, D); (1, L, heads, D)"""
        if how.window not in self._masks:
            self._masks[how.window] = block_mask(self.records, how.window, query.device)
        length = query.shape[2]
        filling = (0, 0, 0, _filled(length) - length)
        # The memory layout must be the same in all calls; without padding, `pad` keeps that of its input.
        query, key, value = (pad(t, filling).contiguous() for t in (query, key, value))
        with torch._dynamo.config.patch(COMPILING):
            output: Tensor = compiled()(
                query,
                key,
                value,
                score_mod=None if how.softcap is None else _capped(how.softcap),
                block_mask=self._masks[how.window],
                scale=how.scaling,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        return output.narrow(2, 0, length).transpose(1, 2)


def _capped(softcap: float) -> Any:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@cache
def compiled() -> Any:
    """Return the compiled kernel."""
    # `fullgraph` makes a partial compilation an error; it would compute the scores of all pairs of tokens.
    return torch.compile(flex_attention, fullgraph=True)


# ---- The mask --------------------------------------------------------------------------------------


def block_mask(records: Shape, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask of a packed row: a token sees its record's prompt and its own segment up to itself.

    Args:
        records: for each record, the length of its prompt and of each completion.
        window: number of latest positions that a token sees, including itself; None for all.
        device: device of the tokens.
    """
    ranges = seen_by(records, window)
    some, every = (_numbered(blocks) for blocks in _blocks(ranges))
    prompt_from, prompt_to, own_from = ranges.to(device)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (key >= own_from[query]) & (key <= query)
        seen: Tensor = own | ((key >= prompt_from[query]) & (key < prompt_to[query]))
        return seen

    length = ranges.shape[1]
    mask = BlockMask.from_kv_blocks(
        *some, *every, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )
    return mask.to(device)


def seen_by(records: Shape, window: int | None) -> Tensor:
    """Return the visible ranges of each token: start and end of its prompt, and start of its own segment.

    int64 (3, L), with L in whole blocks; the end is exclusive. A padding token sees only itself.
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
    if window is not None:
        token = torch.arange(len(own_from))
        # A completion's positions continue from its prompt's end.
        position = token - own_from + prompt_to - prompt_from
        prompt_from = torch.maximum(prompt_from, prompt_from + position - window + 1).minimum(prompt_to)
        own_from = torch.maximum(own_from, token - window + 1)
    return torch.stack((prompt_from, prompt_to, own_from))


def _filled(length: int) -> int:
    """Return the length of a row padded to whole blocks, at least two; one block would compile again."""
    return BLOCK * max(2, -(-length // BLOCK))


def _blocks(ranges: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block of queries the blocks of keys that are visible in part, and in full.

    Both are bool (L / BLOCK, L / BLOCK). The computation is by token and block, so no tensor of size (L, L)
    is needed.
    """
    prompt_from, prompt_to, own_from = ranges[:, :, None]
    token = torch.arange(ranges.shape[1])[:, None]
    first = torch.arange(0, ranges.shape[1], BLOCK)[None]
    last = first + BLOCK - 1
    some = (own_from <= last) & (first <= token)
    # An empty range is not visible, though its ends may lie in a block.
    some |= (prompt_from < prompt_to) & (prompt_from <= last) & (first < prompt_to)
    every = ((own_from <= first) & (last <= token)) | ((prompt_from <= first) & (last < prompt_to))
    some, every = (seen.view(-1, BLOCK, first.shape[1]) for seen in (some, every))
    full = every.all(1)
    return some.any(1) & ~full, full


def _numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks in each row, and their indices first: int32 (1, 1, B) and (1, 1, B, B)."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


# ---- The test of the kernel ------------------------------------------------------------------------

TRIALS: tuple[Shape, ...] = (
    ((150, (40, 70)), (3, (1, 9))),
    ((300, (100, 5, 60)), (260, (20,))),
    ((200, (56,)),),
    ((9, (2,)),),
)
"""Rows that test a kernel. Their lengths differ, so the kernel for any length is compiled; one row has only
whole blocks; and some blocks are fully visible."""

CLOSE = 0.02
"""Largest relative distance between half-precision and float32 results that counts as rounding."""


FAILURES = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError),
    *(OSError, SubprocessError, FailOnRecompileLimitHit),
)
"""Errors that tracing, compiling and starting a kernel may raise: no compiler, too large a tile, ..."""


def trusted(query: Tensor, key: Tensor, how: Attention) -> bool:
    """Return whether the kernel can be used: switched on, on a GPU, in half precision, if its test passes."""
    if os.environ.get(SWITCH) != "1" or query.device.type != "cuda" or query.dtype not in HALF:
        return False
    heads, kv_heads, size = query.shape[1], key.shape[1], query.shape[3]
    return _tried(query.device, query.dtype, heads, kv_heads, size, how.scaling, how.softcap)


@cache
def _tried(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    scaling: float,
    softcap: float | None,
) -> bool:
    log.info("compiling attention for %s; this takes a moment", device)
    how = Attention(scaling, None, softcap)
    try:
        # The test saves its own tensors for backward, even within a checkpoint.
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept):
            far = [_distance(records, device, dtype, heads, kv_heads, size, how) for records in TRIALS]
        worst = math.nan if any(map(math.isnan, far)) else max(far)
        problem = None if worst <= CLOSE else f"its results are off by {worst:.1%}"
    except FAILURES as error:
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem is not None:
        log.warning("attention falls back to one kernel per segment, since flex attention fails: %s", problem)
    return problem is None


def _distance(
    records: Shape,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    size: int,
    how: Attention,
) -> float:
    """Return the largest relative distance of the kernel's results from those of the segments in float32.

    The results are the output, with and without gradient, and the gradients.
    """
    generator = torch.Generator().manual_seed(0)
    length = sum(prompt + sum(sizes) for prompt, sizes in records)
    shapes = [(length, count, size) for count in (heads, kv_heads, kv_heads)]
    given = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    slope = torch.randn(1, length, heads, size, generator=generator).to(device, dtype)
    results: list[tuple[Tensor, ...]] = []
    for way, wide in ((Segments(records), torch.float32), (Blocks(records), dtype)):
        leaves = [tensor.to(wide).requires_grad_() for tensor in given]
        query, key, value = (leaf[None].transpose(1, 2) for leaf in leaves)
        with torch.enable_grad():
            output = way.attend(query, key, value, how)
            gradients = torch.autograd.grad(output, leaves, slope.to(wide))
        with torch.no_grad():
            again = way.attend(query, key, value, how)
        results.append((output.detach(), again, *gradients))
    # The maximum of a tensor, unlike that of a list, is NaN if an element is NaN.
    return float(torch.stack([(b - a).norm() / a.norm() for a, b in zip(*results, strict=True)]).max())
