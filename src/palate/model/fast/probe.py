"""A test of a model on a few tokens, with the fast and with the plain path.

If both paths return the same log-probabilities, the model's layers follow layouts, and its head can be
computed in tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from palate.config import Sampling
from palate.model.codec import Codec
from palate.model.fast.attention import Attention, NotUnderstood, following
from palate.model.fast.decode import Decoder
from palate.model.fast.fused import Fused, can_fuse
from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, ending, positions, predicting
from palate.model.fast.lean import states_of
from palate.model.fast.segments import Shape
from palate.model.loaded import Head
from palate.model.rows import Row

PROBE = ((5, (4, 1)), (1, (3,)), (9, (2, 6)))
"""Prompt and completion lengths of the records that test a model."""


def disagreement(network: Any, codec: Codec, head: Head) -> str | None:
    """Return why the fast engine's results differ from the plain engine's; None if they agree up to rounding.

    Args:
        network, codec: the model to test.
        head: `lm` for a language model; `scalar` or `value` for a classifier with one output.
    """
    return _scores_disagree(network) if head != "lm" else _logps_disagree(network, codec)


FOREIGN = (NotUnderstood, TypeError, AttributeError, RuntimeError, ValueError, IndexError)
"""Errors that an unknown architecture may raise for unknown arguments."""


@torch.no_grad()
def _logps_disagree(network: Any, codec: Codec) -> str | None:
    """Return why fast and plain log-probabilities differ; None if they agree up to rounding."""
    head = LMHead.of(network)
    if head is None:
        return "its head is not a plain linear map"
    if _chunked(network):
        return IN_CHUNKS
    ids = _probe_ids(network)
    plain = _plain_logps(network, PROBE, ids)
    layout = _Watched(PROBE)
    try:
        gap = float((_packed_logps(network, head, layout, ids) - plain).abs().max())
        sampled = _sampler_gap(network, head, codec, ids)
    except FOREIGN as error:
        return _unfollowed(error)
    if layout.misses_window(network):
        return IN_MASK
    limit = _rounding(network, ids[0])
    if max(gap, sampled) <= limit:
        return None
    return (
        f"fast and plain log-probabilities differ by {max(gap, sampled):.2g} nats ({limit:.2g} is rounding)"
    )


@torch.no_grad()
def _scores_disagree(network: Any) -> str | None:
    """Return why a classifier's hidden states differ in a packed row; None if they agree up to rounding.

    Scores would not show a difference if the head is new, small or zero.
    """
    if _chunked(network):
        return IN_CHUNKS
    ids = _probe_ids(network)
    rows = [whole for row, shape in zip(ids, PROBE, strict=True) for whole in _rows(row, shape)]
    last = [
        network.base_model(input_ids=row[None].to(network.device), use_cache=False).last_hidden_state[:, -1]
        for row in rows
    ]
    plain = torch.cat(last).float()
    layout = _Watched(PROBE)
    try:
        hidden = _packed_hidden(network, layout, ids)
    except FOREIGN as error:
        return _unfollowed(error)
    if layout.misses_window(network):
        return IN_MASK
    packed = hidden[ending(PROBE).to(hidden.device)].float()
    gap = float(((packed - plain).norm(dim=-1) / plain.norm(dim=-1)).max())
    limit = 1e-4 if hidden.dtype == torch.float32 else 0.05
    return None if gap <= limit else f"fast and plain hidden states differ by {gap:.1%} of their size"


IN_CHUNKS = "its attention is in chunks, which only its mask contains"
IN_MASK = "its attention has a sliding window, which only its mask contains"


class _Watched(PackedLayout):
    """Records the windows that the layers use, since the test is too short to reveal a missing window."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shape = shape
        self.windows: set[int | None] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        self.windows.add(how.window)
        return super().attend(layer, query, key, value, how)

    def misses_window(self, network: Any) -> bool:
        """Return whether the configuration has a sliding window, but no layer used one."""
        config = network.config.get_text_config().to_dict()
        kinds = config.get("layer_types") or ("sliding_attention",)
        in_force = config.get("sliding_window") and config.get("use_sliding_window", True)
        return bool(in_force) and "sliding_attention" in kinds and self.windows <= {None}


def _chunked(network: Any) -> bool:
    return bool(network.config.get_text_config().to_dict().get("attention_chunk_size"))


def _unfollowed(error: Exception) -> str:
    return f"its layers do not follow a layout ({type(error).__name__}: {str(error)[:80]})"


def _probe_ids(network: Any) -> list[Tensor]:
    """Return the tokens of each test record, its prompt followed by its completions."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    return [torch.randint(vocabulary, (p + sum(cs),), generator=generator) for p, cs in PROBE]


def _rows(ids: Tensor, shape: tuple[int, Sequence[int]]) -> list[Tensor]:
    """Return a record's completions, each preceded by the prompt."""
    prompt, sizes = shape
    return [torch.cat((ids[:prompt], part)) for part in torch.split(ids[prompt:], list(sizes))]


def _rounding(network: Any, ids: Tensor) -> float:
    """Return the largest expected rounding error of a log-probability, in nats."""
    logits = network(input_ids=ids[None].to(network.device), use_cache=False).logits
    if logits.dtype == torch.float32:
        return 1e-3
    # Errors of the layers add to that of the logits; training with a high rate makes both larger.
    return 0.05 + 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max())


def _sampler_gap(network: Any, head: LMHead, codec: Codec, ids: list[Tensor]) -> float:
    """Return the largest difference of the decoder's log-probabilities from the plain ones, in nats."""
    sampling = Sampling.model_validate({"max_new_tokens": 3})
    prompts = [tuple(row[:prompt].tolist()) for row, (prompt, _) in zip(ids, PROBE, strict=True)]
    groups = [[Row(prompt, np.full(3, 0.3 + 0.4 * j)) for j in range(2)] for prompt in prompts]
    # There are two slots for three prompts, so one slot is refilled.
    longest = max(map(len, prompts))
    fused = Fused(network) if can_fuse(network) else None
    decoder = Decoder(network, head, codec, sampling, slots=2, rows=2, longest=longest, fused=fused)
    for _ in decoder.run(iter(groups)):
        pass
    rows = [row for group in groups for row in group]
    shapes = [(len(row.prompt_ids), (len(row.tokens),)) for row in rows]
    expected = _plain_logps(network, shapes, [torch.tensor([*row.prompt_ids, *row.tokens]) for row in rows])
    sampled = torch.tensor([logp for row in rows for logp in row.logps], device=expected.device)
    return float((sampled - expected).abs().max())


def _packed_hidden(network: Any, layout: _Watched, ids: list[Tensor]) -> Tensor:
    with following(network):
        return states_of(network)(torch.cat(ids)[None], positions(layout.shape), layout)[0]


def _packed_logps(network: Any, head: LMHead, layout: _Watched, ids: list[Tensor]) -> Tensor:
    hidden = _packed_hidden(network, layout, ids)
    targets = torch.cat([row[prompt:] for row, (prompt, _) in zip(ids, layout.shape, strict=True)])
    return head.logps(hidden[predicting(layout.shape).to(hidden.device)], targets.to(hidden.device))[0]


def _plain_logps(network: Any, shape: Shape, ids: list[Tensor]) -> Tensor:
    logps = []
    for row, record in zip(ids, shape, strict=True):
        for whole in _rows(row, record):
            given = whole[None].to(network.device)
            logits = network(input_ids=given, use_cache=False).logits[0, record[0] - 1 : -1].float()
            logps.append(logits.log_softmax(-1).gather(-1, given[0, record[0] :, None])[:, 0])
    return torch.cat(logps)
