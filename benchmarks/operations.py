"""Count the operations in matrix products of both sides of `sampling.py` and `online_dpo.py` from the shapes.

    python benchmarks/operations.py

The script counts products with weights: two operations per weight and token, padding included if a side pads.
Attention is not counted; it is small at these lengths. Nothing is timed, so the ratios are the same on every
machine. A speed-up beyond these ratios comes from faster execution, not from fewer operations.
"""

from __future__ import annotations

from dataclasses import dataclass

from common import arguments, finish, prompts
from online_dpo import SHAPES as STEPS
from sampling import SHAPES as SAMPLES


@dataclass(frozen=True)
class Work:
    """Number of tokens computed by the layers and by the head."""

    body: int
    head: int

    def __add__(self, other: Work) -> Work:
        return Work(self.body + other.body, self.head + other.head)

    def times(self, passes: int) -> Work:
        """Return the same work repeated `times` times."""
        return Work(passes * self.body, passes * self.head)


def sampled(lengths: list[int], n: int, new: int, *, shared: bool) -> Work:
    """Count the tokens for n completions of `new` tokens per prompt; the layers skip the last token.

    If shared, a prompt and its first logits are computed once; else for every row, padded to the longest.
    """
    rows = n * len(lengths)
    if shared:
        return Work(sum(lengths) + rows * (new - 1), len(lengths) + rows * (new - 1))
    return Work(rows * (max(lengths) + new - 1), rows * new)


def forward(lengths: list[int], n: int, new: int, *, shared: bool) -> Work:
    """Count one pass over prompts and completions; if not shared, the head also computes prompt logits."""
    rows = n * len(lengths)
    if shared:
        return Work(sum(lengths) + rows * new, rows * new)
    return Work(rows * (max(lengths) + new), rows * (max(lengths) + new))


def step(lengths: list[int], n: int, new: int, *, shared: bool) -> Work:
    """Count a step of online DPO on all weights: sampling, reference, forward, and backward (two forwards).

    Palate's head does not keep its logits, so it computes them again in the backward pass.
    """
    one = forward(lengths, n, new, shared=shared)
    again = Work(0, one.head) if shared else Work(0, 0)
    return sampled(lengths, n, new, shared=shared) + one.times(4) + again


def main() -> None:
    given = arguments(__doc__ or "")
    from palate.config import ModelConfig
    from palate.model import load_model
    from palate.quiet import quiet_libraries
    from palate.types import Prompt

    quiet_libraries()
    model = load_model(ModelConfig(fast=False), trainable=False)
    codec, network = model.codec, model.network
    head = network.get_output_embeddings().weight.numel()
    matrices = [p.numel() for p in network.parameters() if p.dim() == 2]
    body = sum(matrices) - network.get_input_embeddings().weight.numel()

    def operations(work: Work) -> int:
        return 2 * (work.body * body + work.head * head)

    detail: dict[str, dict[str, float]] = {}
    for kind, shapes, count in (("sampling", SAMPLES, sampled), ("step", STEPS, step)):
        for name, s in shapes.items():
            lengths = [len(codec.prompt_ids(Prompt(text))) for text in prompts(s["count"], s["tokens"])]
            n = s.get("n", 2)
            ours, theirs = (count(lengths, n, s["new"], shared=shared) for shared in (True, False))
            detail[f"{kind} {name}"] = {
                "longest_prompt": max(lengths),
                "mean_prompt": round(sum(lengths) / len(lengths), 1),
                "palate_tflop": round(operations(ours) / 1e12, 3),
                "peer_tflop": round(operations(theirs) / 1e12, 3),
                "layers_ratio": round(theirs.body / ours.body, 2),
                "ratio": round(operations(theirs) / operations(ours), 2),
            }
    ratios = {name: found["ratio"] for name, found in detail.items()}
    finish(given, {"dtype": "any", "counted": detail}, ratios)


if __name__ == "__main__":
    main()
