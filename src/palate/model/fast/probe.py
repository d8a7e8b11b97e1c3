"""Which models the fast paths understand, and what they keep for them.

A model is tried once, on a few tokens: if packed log-probabilities are those of the plain way, its layers
follow layouts and its head is the one that is computed in tiles. Otherwise the plain way is used, and said.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft.tuners import lora
from torch import Tensor, nn

from palate.config import Sampling
from palate.model.codec import Codec
from palate.model.fast.attention import Attention, NotUnderstood, following
from palate.model.fast.decode import Decoder
from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, ending, positions, predicting
from palate.model.fast.lean import states_of
from palate.model.fast.segments import Shape
from palate.model.rows import Row
from palate.model.widened import widening

log = logging.getLogger("palate")

PROBE = ((5, (4, 1)), (1, (3,)), (9, (2, 6)))
"""Prompt and completion lengths of the records on which a model is tried."""


class FastPath:
    """What the fast ways need of a network that they understand."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self._merged: Any = None
        self._merged_at: int | None = None

    @property
    def head(self) -> LMHead:
        """The map from hidden states to logits."""
        return head_of(self.network)

    def can_merge(self) -> bool:
        """Whether adding the adapter into the weights gives the same function.

        In bfloat16 it does not: a young adapter changes weights by less than they resolve, and most of the
        change would be rounded away. Adapters on the parameters of a mixture's experts are left as they are.
        """
        layers = [layer for _, layer in _adapted(self.network)]
        return all(
            isinstance(layer, lora.Linear | lora.Embedding)
            and layer.get_base_layer().weight.dtype == torch.float32
            and adapter not in layer.lora_variant  # DoRA and others, which are no sum
            and not layer.lora_bias.get(adapter)
            for layer in layers
            for adapter in layer.active_adapters
        )

    @torch.no_grad()
    def merged(self, revision: int) -> Any:
        """The network with its LoRA adapter added into the weights, for sampling: fewer and larger products.

        What the adapter does not touch is shared with the live network, so the copy is of the adapted
        matrices alone. It is filled anew when `revision` is another than the last time.
        """
        if self._merged is None:
            self._merged = _without_adapters(self.network)
        if self._merged_at != revision:
            for name, layer in _adapted(self.network):
                weight = layer.get_base_layer().weight
                total = weight.float() + sum(
                    layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters
                )
                self._merged.get_submodule(name).weight.copy_(total)
            self._merged_at = revision
        return self._merged


def head_of(network: Any) -> LMHead:
    """The head of a network that is known to have one."""
    head = LMHead.of(network)
    assert head is not None, "only a model with a plain head has a fast path"
    return head


def fast_path(network: Any, codec: Codec, name: str, *, scores: bool = False) -> FastPath | None:
    """The fast path of a network, or None, with a line in the log, if its numbers are not the plain way's.

    Args:
        network, codec: what is tried.
        name: in the log.
        scores: it is a classifier with one output, and its scores are what counts.
    """
    with widening(network):
        why = _scores_disagree(network) if scores else _disagreement(network, codec)
    if why is None:
        return FastPath(network)
    log.warning("%s takes the plain way, which is slower: %s", name, why)
    return None


_FOREIGN = (NotUnderstood, TypeError, AttributeError, RuntimeError, ValueError, IndexError)
"""What a foreign architecture may do with arguments that it was not made for."""


@torch.no_grad()
def _disagreement(network: Any, codec: Codec) -> str | None:
    """Why the fast ways' log-probabilities are not the plain way's; None if they are, but for rounding."""
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
    except _FOREIGN as error:
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
    """Why what a classifier reads its scores from is another in a packed row; None if it is the same.

    That are hidden states: by scores of a head that is new, small or zero nothing could be told.
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
    except _FOREIGN as error:
        return _unfollowed(error)
    if layout.misses_window(network):
        return IN_MASK
    packed = hidden[ending(PROBE).to(hidden.device)].float()
    gap = float(((packed - plain).norm(dim=-1) / plain.norm(dim=-1)).max())
    limit = 1e-4 if hidden.dtype == torch.float32 else 0.05
    return None if gap <= limit else f"fast and plain hidden states differ by {gap:.1%} of their size"


IN_CHUNKS = "its attention is in chunks, which only its mask knows of"
IN_MASK = "its attention has a sliding window, which only its mask knows of"


class _Watched(PackedLayout):
    """Notes which windows the layers ask for: the probe is too short for one that is missing to show."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.shape = shape
        self.windows: set[int | None] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, how: Attention) -> Tensor:
        """See `Layout`."""
        self.windows.add(how.window)
        return super().attend(layer, query, key, value, how)

    def misses_window(self, network: Any) -> bool:
        """Whether the network's configuration has a window, and no layer has asked for one."""
        config = network.config.get_text_config().to_dict()
        kinds = config.get("layer_types") or ("sliding_attention",)
        in_force = config.get("sliding_window") and config.get("use_sliding_window", True)
        return bool(in_force) and "sliding_attention" in kinds and self.windows <= {None}


def _chunked(network: Any) -> bool:
    return bool(network.config.get_text_config().to_dict().get("attention_chunk_size"))


def _unfollowed(error: Exception) -> str:
    return f"its layers do not follow a layout ({type(error).__name__}: {str(error)[:80]})"


def _probe_ids(network: Any) -> list[Tensor]:
    """Tokens of the probe's records, prompts and completions in a row."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = network.get_input_embeddings().weight.shape[0]
    return [torch.randint(vocabulary, (p + sum(cs),), generator=generator) for p, cs in PROBE]


def _rows(ids: Tensor, shape: tuple[int, Sequence[int]]) -> list[Tensor]:
    """A record's completions, each behind the prompt."""
    prompt, sizes = shape
    return [torch.cat((ids[:prompt], part)) for part in torch.split(ids[prompt:], list(sizes))]


def _rounding(network: Any, ids: Tensor) -> float:
    """How far rounding may move a log-probability, in nats: in half precision, by the size of the logits."""
    logits = network(input_ids=ids[None].to(network.device), use_cache=False).logits
    if logits.dtype == torch.float32:
        return 1e-3
    return 0.05 + 2 * torch.finfo(logits.dtype).eps * float(logits.abs().max())


def _sampler_gap(network: Any, head: LMHead, codec: Codec, ids: list[Tensor]) -> float:
    """How far the sampling engine's log-probabilities of its first tokens are from the plain way's."""
    sampling = Sampling.model_validate({"max_new_tokens": 3})
    prompts = [tuple(row[:prompt].tolist()) for row, (prompt, _) in zip(ids, PROBE, strict=True)]
    groups = [[Row(prompt, np.full(3, 0.3 + 0.4 * j)) for j in range(2)] for prompt in prompts]
    # Two slots for three prompts: one of them is refilled.
    decoder = Decoder(network, head, codec, sampling, slots=2, rows=2, longest=max(map(len, prompts)))
    for _ in decoder.run(iter(groups)):
        pass
    rows = [row for group in groups for row in group]
    shapes = [(len(row.prompt_ids), (len(row.tokens),)) for row in rows]
    wanted = _plain_logps(network, shapes, [torch.tensor([*row.prompt_ids, *row.tokens]) for row in rows])
    found = torch.tensor([logp for row in rows for logp in row.logps], device=wanted.device)
    return float((found - wanted).abs().max())


def _packed_hidden(network: Any, layout: _Watched, ids: list[Tensor]) -> Tensor:
    with following(network):
        return states_of(network)(torch.cat(ids)[None], positions(layout.shape), layout)[0]


def _packed_logps(network: Any, head: LMHead, layout: _Watched, ids: list[Tensor]) -> Tensor:
    hidden = _packed_hidden(network, layout, ids)
    targets = torch.cat([row[prompt:] for row, (prompt, _) in zip(ids, layout.shape, strict=True)])
    return head.logps(hidden[predicting(layout.shape).to(hidden.device)], targets.to(hidden.device))[0]


def _plain_logps(network: Any, shape: Shape, ids: list[Tensor]) -> Tensor:
    found = []
    for row, record in zip(ids, shape, strict=True):
        for whole in _rows(row, record):
            given = whole[None].to(network.device)
            logits = network(input_ids=given, use_cache=False).logits[0, record[0] - 1 : -1].float()
            found.append(logits.log_softmax(-1).gather(-1, given[0, record[0] :, None])[:, 0])
    return torch.cat(found)


def _adapted(network: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, lora.LoraLayer)]


def _without_adapters(network: Any) -> Any:
    """A network like this one with plain layers where it has adapted ones, sharing all other weights."""
    adapted = _adapted(network)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    shared |= {id(layer): copy.copy(layer.get_base_layer()) for _, layer in adapted}
    bare = copy.deepcopy(network, shared)
    for name, _ in adapted:
        layer = bare.get_submodule(name)
        layer._parameters = dict(layer._parameters)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    return bare.eval()
