"""Attention in batches of similar segments against attention segment by segment."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from palate.model.fast.attention import Attention
from palate.model.fast.batched import BLOCK, PADDED, Batch, Batches, Segment, segments_of, similar
from palate.model.fast.segments import Segments, Shape

ALIKE = ((41, (64, 64)), (45, (60, 64)), (49, (64,)), (9, (8, 8, 0)))
SHAPES: dict[str, Shape] = {
    "alike": ALIKE,
    "of one token": ((1, (1, 1)), (1, (1,))),
    "unlike": ((5, (4, 1)), (1, (3,)), (30, (2, 12))),
    "prompts": ((12, ()), (11, ()), (12, ())),
    "long prompts": ((300, (20, 20)), (310, (20, 20))),  # in blocks
    "one block and one token": ((BLOCK, (3,)), (BLOCK + 1, (3,))),
    "long completions": ((30, (BLOCK + 2, 2 * BLOCK + 1)), (0, (BLOCK + 1,))),
    "a very long prompt": ((1100, (2,)),),  # alone
}


def results(
    way: type[Segments] | type[Batches],
    shape: Shape,
    kv_heads: int,
    how: Attention,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The output and the gradients of query, key and value, for inputs that bfloat16 has."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(prompt + sum(completions) for prompt, completions in shape)

    def drawn(heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, 8, generator=generator).bfloat16().to(dtype).transpose(1, 2)

    inputs = [drawn(heads).requires_grad_() for heads in (6, kv_heads, kv_heads)]
    output = way(shape).attend(*inputs, how)
    weights = torch.randn(output.shape, generator=generator).bfloat16().to(dtype)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_those_of_single_segments(
    name: str, kv_heads: int, window: int | None
) -> None:
    how = Attention(8**-0.5, window, None)
    for ours, theirs in zip(
        *(results(way, SHAPES[name], kv_heads, how) for way in (Batches, Segments)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["alike", "long prompts"])
def test_half_precision_is_as_exact_as_the_kernel(name: str) -> None:
    how = Attention(1.0, None, None)  # large scores, whose errors would count most
    exact, ours, kernel = (
        results(way, SHAPES[name], 2, how, dtype)
        for way, dtype in ((Segments, torch.float64), (Batches, torch.bfloat16), (Segments, torch.bfloat16))
    )
    for wanted, own, other in zip(exact, ours, kernel, strict=True):
        error, allowed = ((found.double() - wanted).norm() / wanted.norm() for found in (own, other))
        assert error < 1.3 * allowed


def test_batches_hold_every_segment_once_and_little_padding() -> None:
    for shape in SHAPES.values():
        batches = similar(segments_of(shape))
        assert sorted(s for batch in batches for s in batch) == [s for s in segments_of(shape) if s.size]
        for batch in batches:
            count, queries, keys = Batch(batch, 0, None).sizes
            assert count * queries * keys <= PADDED * sum(s.size * s.keys for s in batch)
    assert len(similar(segments_of(ALIKE))) < len(segments_of(ALIKE)) / 2


def test_keys_by_hand() -> None:
    # Two completions of two tokens and one, after a prompt of one; 9 is padding.
    batch = Batch([Segment(1, 2, ((0, 1),)), Segment(3, 1, ((0, 1),))], 9, None)
    assert batch.queries.tolist() == [[1, 2], [3, 9]]
    assert batch.keys.tolist() == [[0, 1, 2], [0, 3, 9]]
    assert batch.uses[:, :4].tolist() == [[0, 1, 2, 4], [3, 6, 6, 6]]
    seen = batch.bias == 0
    assert seen[0].tolist() == [[True, True, False], [True, True, True]]
    assert seen[1, 0].tolist() == [True, True, False]
