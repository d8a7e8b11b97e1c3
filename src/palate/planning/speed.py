"""Arithmetic and time of a run, from its tokens and from rates that were measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from palate.planning.network import Network

CHUNK = 4
"""Size of a sampling call of many completions, as a multiple of the rows sampled in parallel."""

CHECKPOINTS = 0.02
"""Share of the training time that checkpoints take by default."""


@dataclass(frozen=True)
class Rates:
    """Seconds on this machine.

    Attributes:
        load: to load the model.
        call: of a call of sampling besides its tokens, such as merging the adapter.
        step: of one decoding step, whatever its rows.
        row: of each row of a decoding step.
        prompt: per prompt token while sampling.
        forward: per token without gradient.
        update: per token with gradient.
        apply: of one optimizer step.
        score: per completion of a reward that computes here; 0 for a judge.
    """

    load: float
    call: float
    step: float
    row: float
    prompt: float
    forward: float
    update: float
    apply: float
    score: float = 0.0


@dataclass(frozen=True)
class Draws:
    """Completions that are sampled in calls of equal size.

    Attributes:
        completions: in all.
        each: completions of one call.
        mean, longest: tokens of a completion.
        prompt_tokens: tokens of all prompts.
    """

    completions: float
    each: int
    mean: float
    longest: float
    prompt_tokens: float

    def seconds(self, rates: Rates, rows: int) -> float:
        """Return the time, with at most `rows` completions in parallel.

        A call of few completions decodes as many steps as its longest completion has tokens. In a call of
        many, finished rows are replaced until the call runs out of prompts.
        """
        if not self.completions:
            return 0.0
        each = max(1, min(self.each, CHUNK * rows))
        calls = self.completions / each
        tokens = each * self.mean
        steps = self.longest if each <= rows else tokens / rows + self.longest / 2
        return calls * (rates.call + steps * rates.step + tokens * rates.row) + (
            self.prompt_tokens * rates.prompt
        )


@dataclass(frozen=True)
class Seconds:
    """Expected time of a run on this machine, by its use; `judge` is None if a server takes it."""

    loading: float
    sampling: float
    scoring: float
    learning: float
    annotating: float | None

    @property
    def total(self) -> float:
        """The sum, without the time of a server."""
        return self.loading + self.sampling + self.scoring + self.learning + (self.annotating or 0.0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations: two per weight and token in a product, without attention."""

    sampling: float
    scoring: float
    learning: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.sampling + self.scoring + self.learning


def flops_of(
    network: Network, *, read: float, sampled: float, scored: float, learned: float, rank: int | None
) -> Flops:
    """Return the operations of a run.

    A backward pass costs a pass for the gradient of the activations, and one more for that of trained
    weights. With LoRA only the adapter has the latter.

    Args:
        network: the policy's sizes.
        read: prompt tokens while sampling.
        sampled: tokens sampled.
        scored: tokens without gradient.
        learned: tokens with gradient.
        rank: of the adapter; None trains all weights.
    """
    token = 2.0 * (network.in_products + network.head)
    extra = 0.0 if rank is None else 2.0 * network.adapter(rank)
    backward = token if rank is None else extra
    return Flops(
        sampling=token * sampled + 2.0 * network.in_products * read,
        scoring=(token + extra) * scored,
        learning=(2 * (token + extra) + backward) * learned,
    )
