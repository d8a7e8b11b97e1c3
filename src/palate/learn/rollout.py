"""Learning from rollouts: completions with an advantage for each of their tokens, and the two objectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from palate.learn.objective import Needs, Numbers
from palate.losses import ppo_clip, ppo_clipped, reinforce, value_clip
from palate.model import Outputs, ragged
from palate.types import Completion, Example, Prompt


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt with its sampled completions, and the numbers of their tokens at the time of sampling.

    Each tensor belongs to one completion and has one number per token, without gradient. float32 (T,)

    Attributes:
        prompt, completions: as sampled.
        logps: under the policy that sampled them, computed by the learner.
        advantages: of each token.
        values: of the state before each token; zeros without a value function.
        returns: targets of the value function; zeros without one.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    logps: tuple[Tensor, ...]
    advantages: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    returns: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """Tokens of all completions."""
        return sum(len(c.token_ids) for c in self.completions)


@dataclass(frozen=True)
class PolicyGradient:
    """The loss of PPO or REINFORCE on rollouts, and beside it the likelihood of texts that must stay likely.

    L = 1 / T Σ_t loss_t - γ 1 / T' Σ_t log π(token t of the texts)

    T and T' count the tokens of all rollouts and of all texts of the update, so that every token counts
    alike, whatever the micro-batches. The second term is that of PPO-ptx (Ouyang et al. 2022,
    arXiv:2203.02155, Eq. 2).

    Metrics have TRL's names: `loss/policy_avg`, `policy/clipfrac_avg` (tokens without gradient),
    `policy/approxkl_avg` (k3 from the policy that sampled to the one that learns), `policy/entropy_avg`,
    `val/ratio`.

    Attributes:
        clip: ε of `ppo_clip`; None for `reinforce`.
        scale: records of the update over tokens of its rollouts.
        mean_length: tokens of a rollout in the mean.
        pretrain_scale: γ times the records of the update over tokens of its texts.
    """

    clip: float | None
    scale: float
    mean_length: float
    pretrain_scale: float = 0.0
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def of(
        cls, records: Sequence[Rollout | Example], *, clip: float | None, pretrain_coef: float = 0.0
    ) -> Self:
        """Return the objective of one update on rollouts, and on examples of text, if there are any."""
        sizes = [r.size for r in records if isinstance(r, Rollout)]
        texts = [len(r.completion.token_ids) for r in records if isinstance(r, Example)]
        assert sizes, "an update has rollouts"
        pretrain = pretrain_coef * len(records) / sum(texts) if texts else 0.0
        return cls(clip, len(records) / sum(sizes), sum(sizes) / len(sizes), pretrain)

    def __call__(self, outputs: Outputs, records: Sequence[Rollout | Example]) -> tuple[Tensor, Numbers]:
        """Loss of each record. (R,)"""
        assert outputs.logps is not None
        now, mask = outputs.logps.values, outputs.logps.mask
        old, advantages = (_spread(records, of, now) for of in ("logps", "advantages"))
        rolled = torch.tensor([isinstance(r, Rollout) for r in records], device=now.device)
        owner = _owners(records, now.device)
        own, texts = mask & rolled[owner][:, None], mask & ~rolled[owner][:, None]

        def per_record(of_tokens: Tensor) -> Tensor:
            return of_tokens.new_zeros(len(records)).index_add(0, owner, of_tokens.sum(-1))

        if self.clip is None:
            policy = per_record(reinforce(now, advantages, own))
        else:
            policy = per_record(ppo_clip(now, old, advantages, own, clip=self.clip))
        nll = per_record(torch.where(texts, -now, 0))
        with torch.no_grad():
            gap = torch.where(own, now - old, 0)
            clipped = torch.zeros_like(own)
            if self.clip is not None:
                clipped = ppo_clipped(now, old, advantages, own, clip=self.clip)
            of_tokens = {
                "policy/clipfrac_avg": clipped.float(),
                "policy/approxkl_avg": gap.exp() - 1 - gap,
                "val/ratio": torch.where(own, gap.exp(), 0),
            }
            if outputs.entropy is not None:
                of_tokens["policy/entropy_avg"] = torch.where(own, outputs.entropy.values, 0)
            numbers = {name: per_record(values) / self.mean_length for name, values in of_tokens.items()}
            numbers["loss/policy_avg"] = policy.detach() / self.mean_length
            numbers = {name: values.masked_fill(~rolled, torch.nan) for name, values in numbers.items()}
            if self.pretrain_scale:
                lengths = per_record(texts.float()).clamp(min=1)
                numbers["nll_loss"] = (nll.detach() / lengths).masked_fill(rolled, torch.nan)
        return self.scale * policy + self.pretrain_scale * nll, numbers


@dataclass(frozen=True)
class ValueRegression:
    """The loss of the value function on rollouts: `value_clip`, every token of the update alike.

    Metrics are `loss/value_avg` and `val/clipfrac_avg`, the share of tokens whose value may not move further.

    Attributes:
        clip: ε of `value_clip`, or None.
        mean_length: tokens of a rollout in the mean, over all rollouts of the update.
    """

    clip: float | None
    mean_length: float
    needs: ClassVar[Needs] = Needs(head="value")

    @classmethod
    def of(cls, records: Sequence[Rollout], *, clip: float | None) -> Self:
        """Return the objective of one update on rollouts."""
        return cls(clip, sum(r.size for r in records) / len(records))

    def __call__(self, outputs: Outputs, records: Sequence[Rollout]) -> tuple[Tensor, Numbers]:
        """Loss of each record. (R,)"""
        assert outputs.values is not None
        now, mask = outputs.values.values, outputs.values.mask
        old, returns = (_spread(records, of, now) for of in ("values", "returns"))
        owner = _owners(records, now.device)

        def per_record(of_tokens: Tensor) -> Tensor:
            sums = of_tokens.new_zeros(len(records)).index_add(0, owner, of_tokens.sum(-1))
            return sums / self.mean_length

        of_tokens = value_clip(now, old, returns, mask, clip=self.clip)
        numbers = {"loss/value_avg": per_record(of_tokens.detach())}
        if self.clip is not None:
            with torch.no_grad():
                plain = value_clip(now, old, returns, mask, clip=None)
                numbers["val/clipfrac_avg"] = per_record((of_tokens > plain).float())
        return per_record(of_tokens), numbers


def _spread(records: Sequence[Rollout | Example], name: str, like: Tensor) -> Tensor:
    """Return numbers of the rollouts' tokens in the places of a model's outputs, 0 elsewhere. (N, T)"""
    rows = [
        row
        for record in records
        for row in (
            getattr(record, name)
            if isinstance(record, Rollout)
            else [torch.zeros(len(c.token_ids)) for c in record.completions]
        )
    ]
    return ragged([row.to(like.device) for row in rows]).values.to(like.dtype)


def _owners(records: Sequence[Rollout | Example], device: torch.device) -> Tensor:
    """Return the index of the record that each completion belongs to. int64 (N,)"""
    return torch.tensor([i for i, r in enumerate(records) for _ in r.completions], device=device)
