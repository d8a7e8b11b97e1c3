"""Weights for a server: the files that it loads, and a test that it computes with them."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from palate.model.batched import batched_logps
from palate.model.loaded import LoadedModel
from palate.types import Completion, Example, Group, Prompt

LARGEST_GAP = {torch.float32: 1e-2}
"""Largest allowed mean difference of a token's log-probability between server and policy, in nats, by number
format; rounding alone gives about 1e-4 in float32."""

OTHER_GAP = 0.15
"""The same for narrower formats, in which rounding gives 0.02 to 0.04: for 16 tokens."""

SAMPLE_GAP = 0.08
"""The same for narrower formats and many tokens, whose mean varies less."""

COMPARED, OF_EACH = 256, 32
"""Number of sampled tokens that are compared with the model, about; and the most of one completion."""
BATCH = 2048
"""Tokens of a micro-batch in which samples are compared."""

NOTICED = {torch.float32: 1e-4}
"""Mean change of a policy's log-probabilities of the same tokens, in nats, by number format, after which a
server with the new weights cannot give exactly its old reply."""

OTHER_NOTICED = 1e-2
"""The same for narrower formats, which round small changes away."""


@dataclass(frozen=True)
class Probe:
    """A completion that tests a server's weights.

    Attributes:
        tokens, logps: the server's reply.
        ours: the policy's log-probabilities of these tokens. (T,)
    """

    tokens: list[int]
    logps: list[float]
    ours: Tensor

    def gap(self) -> float:
        """Return the mean difference between the server's log-probabilities and the policy's, in nats."""
        return float((self.ours - torch.tensor(self.logps)).abs().mean())

    def repeats(self, earlier: Probe) -> bool:
        """Return whether the server gave exactly the same reply as earlier."""
        return (self.tokens, self.logps) == (earlier.tokens, earlier.logps)

    def has_changed(self, earlier: Probe, dtype: torch.dtype) -> bool:
        """Return whether the policy's log-probabilities of the same tokens have changed noticeably."""
        change = float((self.ours - earlier.ours).abs().mean())
        return not change <= NOTICED.get(dtype, OTHER_NOTICED)


def is_tied(network: Any) -> bool:
    """Return whether a network's head shares the weights of its embedding."""
    head, embedding = network.get_output_embeddings(), network.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def write_untied(network: Any, path: Path) -> None:
    """Write a network whose head has a weight of its own, with the values of the shared one."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(network.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.architectures = [type(network).__name__]
    config.save_pretrained(path)


@torch.no_grad()
def probed(model: LoadedModel, prompt_ids: Sequence[int], tokens: list[int], logps: list[float]) -> Probe:
    """Return a server's reply with the model's own log-probabilities; a collective.

    These are infinite if the model does not have one of the tokens.
    """
    if max(tokens) >= model.network.get_input_embeddings().weight.shape[0]:
        return Probe(tokens, logps, torch.full((len(tokens),), -math.inf))
    record = Example(Prompt("", token_ids=tuple(prompt_ids)), Completion("", tuple(tokens)))
    (ours,) = batched_logps(model, [record], len(prompt_ids) + len(tokens)).rows()
    return Probe(tokens, logps, ours.cpu())


def allowed(model: LoadedModel, tokens: int | None = None) -> float:
    """Return the largest mean difference that rounding explains.

    Args:
        model: the model.
        tokens: the number of compared tokens of samples; None for a `Probe`.
    """
    # A mean of few tokens varies more.
    other = OTHER_GAP if tokens is None else SAMPLE_GAP + 1 / max(1, tokens)
    return LARGEST_GAP.get(model.dtype, other)


@torch.no_grad()
def sample_gap(model: LoadedModel, groups: Sequence[Group]) -> tuple[float, int]:
    """Compare a server's samples with the model.

    The tokens are the first ones of completions from all parts of the groups.

    Returns:
        The mean difference of a token's log-probability, in nats, and the number of compared tokens. The
        difference is infinite if the model does not have one of the tokens.
    """
    own = [(group.prompt, c) for group in groups for c in group.completions]
    step = max(1, sum(min(len(c.token_ids), OF_EACH) for _, c in own) // COMPARED)
    records = [Example(prompt, Completion("", c.token_ids[:OF_EACH])) for prompt, c in own[::step]]
    theirs = [logp for _, c in own[::step] for logp in (c.logps or ())[:OF_EACH]]
    if not theirs:
        return 0.0, 0
    largest = max(token for record in records for token in record.completion.token_ids)
    if largest >= model.network.get_input_embeddings().weight.shape[0]:
        return math.inf, len(theirs)
    ours = torch.cat(batched_logps(model, records, BATCH).rows()).cpu()
    return float((ours - torch.tensor(theirs)).abs().mean()), len(theirs)
