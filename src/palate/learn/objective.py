"""Objectives: the outputs that a learner computes for its records, and the loss per record from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from palate.losses import PairLoss
from palate.memory import Logps, key_of
from palate.model import Outputs, Snapshot, TokenValues, ragged
from palate.model.loaded import Head
from palate.statistics import rate_interval
from palate.types import Completion, Pair, Record

R_contra = TypeVar("R_contra", bound=Record, contravariant=True)

Numbers = Mapping[str, Tensor]
"""Metrics by name, float32 (R,): one number per record, NaN if not applicable. The learner takes the mean."""


class Reference(Protocol):
    """A source of the reference's log-probabilities: a snapshot, or a snapshot behind a cache."""

    def logps(self, records: Sequence[Record]) -> TokenValues:
        """Return the log-probability of every completion token, in order. (N, T), no gradient."""


@dataclass(frozen=True)
class Needs:
    """The parts of `Outputs` that an objective reads. The learner computes only these.

    Attributes:
        head: head of the learner's model. `lm` returns log-probabilities of tokens, `scalar` a score of each
            completion, `value` a number for each token.
        ref: source of the reference's log-probabilities of the same micro-batch, which the learner computes
            first and without gradient; None for an objective without a reference.
        top_logits: number of largest logits at each token's position, in addition to the token's own logit; 0
            for neither.
    """

    head: Head = "lm"
    ref: Reference | None = None
    top_logits: int = 0


class Objective(Protocol[R_contra]):
    """Turns a forward pass over records into a loss for each of them."""

    @property
    def needs(self) -> Needs:
        """The parts of `Outputs` that the objective reads."""

    def __call__(self, outputs: Outputs, records: Sequence[R_contra]) -> tuple[Tensor, Numbers]:
        """Return the loss (R,) with gradient, and metrics without."""


@dataclass(frozen=True)
class Pairwise:
    """A loss on pairs of sequence log-probabilities.

    Metrics have TRL's names. `rewards/*` are implicit rewards: beta times the log-ratio of policy and
    reference, or beta times the log-probability for a loss without reference; if the strength of the loss is
    a margin, they have no factor beta. The annotator's rewards have the name `objective/scores`.

    Attributes:
        loss: one of `palate.losses.PAIR_LOSSES`.
        strength: the loss's beta, tau, gamma or delta.
        ref: the reference; required if the loss needs one, otherwise only used in metrics.
        options: further keyword arguments of the loss.
    """

    loss: PairLoss
    strength: float
    ref: Reference | None = None
    options: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> Needs:
        """Log-probabilities, and the reference's log-probabilities if there is a reference."""
        return Needs(ref=self.ref)

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, Numbers]:
        """Return the loss and the implicit rewards of each pair. (R,)"""
        assert outputs.logps is not None
        reduce = TokenValues.sum if self.loss.reduce == "sum" else TokenValues.mean
        chosen, rejected = reduce(outputs.logps).view(-1, 2).unbind(-1)
        ref_chosen = ref_rejected = None
        if outputs.ref_logps is not None:
            ref_chosen, ref_rejected = reduce(outputs.ref_logps).view(-1, 2).unbind(-1)
        loss = self.loss(chosen, rejected, ref_chosen, ref_rejected, self.strength, **self.options)
        with torch.no_grad():
            scale = self.strength if self.loss.scales else 1.0
            numbers = pair_numbers(chosen, rejected, ref_chosen, ref_rejected, scale)
            now = outputs.version
            own = [now is not None and all(drawn_from(now, c) for c in p.completions) for p in records]
            if outputs.ref_logps is not None and any(own):
                # The mean log-ratio estimates the KL only on samples of the current policy: of this version,
                # at temperature 1, without top-k or top-p.
                kl = (outputs.logps.sum() - outputs.ref_logps.sum()).view(-1, 2).mean(-1)
                others = ~torch.tensor(own, device=kl.device)
                numbers = {**numbers, "objective/kl": kl.masked_fill(others, torch.nan)}
        return loss, numbers


def pair_numbers(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor | None, ref_rejected: Tensor | None, beta: float
) -> Numbers:
    """Return implicit rewards, margins, accuracies and log-probabilities of pairs, under TRL's names. (R,)"""
    reward_chosen = beta * (chosen if ref_chosen is None else chosen - ref_chosen)
    reward_rejected = beta * (rejected if ref_rejected is None else rejected - ref_rejected)
    margin = reward_chosen - reward_rejected
    return {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/margins": margin,
        "rewards/accuracies": accuracy(margin),
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
    }


def drawn_from(version: int, completion: Completion) -> bool:
    """True for a completion that was drawn from this version of the policy itself, nothing restricted."""
    unrestricted = completion.sampling_logps in (None, completion.logps)
    return completion.policy_version == version and unrestricted


def accuracy(margin: Tensor) -> Tensor:
    """Return 1 for a margin above zero, 0.5 for exactly zero (no preference, as at step 1), else 0."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def accuracy_interval(outcomes: Sequence[tuple[float, str]]) -> dict[str, float]:
    """The 95 % interval of `rewards/accuracies`, with prompts as clusters; nothing without outcomes.

    Args:
        outcomes: of each record, its accuracy (NaN where there was nothing to rank) and the id of its prompt.
    """
    usable = [(rate, prompt) for rate, prompt in outcomes if rate == rate]
    if not usable:
        return {}
    _, low, high, _ = rate_interval([rate for rate, _ in usable], [prompt for _, prompt in usable])
    return {"rewards/accuracies_low": low, "rewards/accuracies_high": high}


class CachedReference:
    """A reference that computes the log-probabilities of a completion once, for data used several times.

    In a run they are in its journal, on disk, and are read from there: all pairs of large data would fill the
    memory. A snapshot without a memory has no such place; then they are kept here, outside the device.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._known: dict[str, Logps] = {}
        self._device = torch.device("cpu")

    def logps(self, records: Sequence[Record]) -> TokenValues:
        """Return the same as `Snapshot.logps`."""
        if self._snapshot.has_memory:
            return self._snapshot.logps(records, kept=True)
        # A completion itself would be a key of 40 bytes for each of its tokens.
        keys = [key_of(r.prompt.id, r.prompt.token_ids, c.token_ids) for r in records for c in r.completions]
        if not all(key in self._known for key in keys):
            # Compute all records, not only the missing rows: the batch then has the same layout as the
            # learner's, so policy and reference agree to the last bit before the first step.
            logps = self._snapshot.logps(records)
            self._device = logps.values.device
            for key, row in zip(keys, logps.rows(), strict=True):
                self._known.setdefault(key, row.cpu().numpy())  # the first value stays, as in the journal
        return ragged([torch.tensor(self._known[key], device=self._device) for key in keys])
