"""Log-probabilities of target tokens from hidden states, without ever holding more than a tile of logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TILE_ELEMENTS = 1 << 25
"""Tokens x vocabulary of one tile: 128 MiB in float32."""


@dataclass(frozen=True)
class LMHead:
    """A model's map from hidden states to logits.

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: logits are softcap * tanh(raw / softcap), as in Gemma, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, network: Any) -> LMHead | None:
        """The head of a causal model, or None if it is none that is understood here."""
        layer = network.get_output_embeddings()
        if type(layer) is not nn.Linear:
            return None
        return cls(
            layer.weight,
            layer.bias,
            network.config.get_text_config().to_dict().get("final_logit_softcapping"),
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits in the compute dtype. hidden (M, H), the result (M, V)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def logps(
        self, hidden: Tensor, targets: Tensor, *, statistics: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability, entropy and whether it is the likeliest, of each target token.

        Args:
            hidden: (M, H), may carry gradient.
            targets: int64 (M,).
            statistics: compute entropy and top1; zeros otherwise.

        Returns:
            float32 (M,) each; only the first carries gradient.
        """
        found: tuple[Tensor, Tensor, Tensor] = _TargetLogps.apply(  # type: ignore[no-untyped-call]
            hidden, self.weight, self.bias, targets, self.softcap, statistics
        )
        return found


class _TargetLogps(torch.autograd.Function):
    """log softmax(W h + b)[y], tile by tile.

    The log-probability of a token depends on its own hidden state alone, so its derivative
    u = W^T (onehot(y) - softmax) can be computed while the tile of logits is at hand; backward then only
    scales u by the incoming gradient, and nothing is computed twice. Where the head itself is trained, its
    gradient needs the incoming gradient within the tile, and backward makes the tiles again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        statistics: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wants_u = ctx.needs_input_grad[0] and not trains_head
        logps, entropy, top1 = (hidden.new_zeros(len(hidden), dtype=torch.float32) for _ in range(3))
        u = torch.empty_like(hidden) if wants_u else None
        for rows in _tiles(len(hidden), len(weight)):
            raw = nn.functional.linear(hidden[rows], weight, bias).float()
            scored = raw if softcap is None else softcap * torch.tanh(raw / softcap)
            normaliser = scored.logsumexp(-1, keepdim=True)
            target = targets[rows, None]
            logps[rows] = (scored.gather(-1, target) - normaliser)[:, 0]
            if statistics:
                top1[rows] = (scored.argmax(-1) == targets[rows]).float()
            if not (statistics or wants_u):
                continue
            probs = (scored - normaliser).exp_()
            if statistics:
                entropy[rows] = normaliser[:, 0] - torch.einsum("mv,mv->m", probs, scored)
            if u is not None:
                u[rows] = _slope(probs, target, scored, softcap).to(weight.dtype) @ weight
        ctx.softcap = softcap
        ctx.has_bias = bias is not None
        ctx.save_for_backward(*((u,) if u is not None else (hidden, weight, bias, targets)))
        ctx.trains_head = trains_head
        ctx.mark_non_differentiable(entropy, top1)
        return logps, entropy, top1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        g = gradients[0][:, None]
        if not ctx.trains_head:
            (u,) = ctx.saved_tensors
            return (g * u).to(u.dtype), None, None, None, None, None
        hidden, weight, bias, targets = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        for rows in _tiles(len(hidden), len(weight)):
            raw = nn.functional.linear(hidden[rows], weight, bias).float()
            scored = raw if ctx.softcap is None else ctx.softcap * torch.tanh(raw / ctx.softcap)
            slope = _slope(scored.softmax(-1), targets[rows, None], scored, ctx.softcap).mul_(g[rows])
            d_hidden[rows] = slope.to(weight.dtype) @ weight
            d_weight += slope.to(weight.dtype).T @ hidden[rows]
            if d_bias is not None:
                d_bias += slope.sum(0)
        return (
            d_hidden,
            d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(weight.dtype),
            None,
            None,
            None,
        )


def _slope(probs: Tensor, target: Tensor, scored: Tensor, softcap: float | None) -> Tensor:
    """Derivative of the log-probability by the raw logits; overwrites `probs`. (M, V)"""
    slope = probs.neg_().scatter_add_(-1, target, torch.ones_like(target, dtype=probs.dtype))
    return slope if softcap is None else slope.mul_(1 - (scored / softcap) ** 2)


def _tiles(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, TILE_ELEMENTS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]
