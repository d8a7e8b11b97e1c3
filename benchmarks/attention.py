"""Compare the attention of packed rows in half precision: Palate's batches and torch's kernel.

    python benchmarks/attention.py --output benchmarks/results/attention.json

Each row is a micro-batch of about 1,000 tokens with the heads of the embedded model (9 heads of queries, 3 of
keys, 64 numbers each), in bfloat16. `kernel` calls torch's attention for each prompt and completion,
`batches` is what a learner uses, `compiled` what it uses with `--compile on`, including rotations, here by
zero, which the others lack. The sides take turns of several passes; the times are medians of forward and
backward of one layer in milliseconds. The errors are those of the gradient of the keys relative to float64.
The last line has the kernel's time over that of the batches.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from common import arguments, clock, finish, on_gpu, say

ROWS = {
    "6 prompts of 41, 2 completions of 64 each": ((41, (64, 64)),) * 6,
    "2 prompts of 406, 2 completions of 53 each": ((406, (53, 53)),) * 2,
    "2 prompts of 120, 4 completions of 100 each": ((120, (100,) * 4),) * 2,
    "1 prompt of 30, 3 completions of about 200": ((30, (200, 180, 190)),),
    "1 prompt of 100, 20 completions of 40": ((100, (40,) * 20),),
}
HEADS, KEY_HEADS, SIZE = 9, 3, 64
REPEATS = 9
"""Passes of a side in each turn, as the layers of a model follow each other."""


def main() -> None:
    given = arguments(__doc__ or "")
    if on_gpu():
        raise SystemExit("attention.py measures processors; hide the GPU from torch")
    import torch

    from palate.model.compiling import obstacle
    from palate.model.fast.attention import Attention
    from palate.model.fast.batched import Batches
    from palate.model.fast.layout import PackedLayout
    from palate.model.fast.native import Kind, Library
    from palate.model.fast.native_layers import NativeOperations
    from palate.model.fast.segments import Segments

    how = Attention(SIZE**-0.5, None, None)
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, tokens: int) -> Any:
        return torch.randn(1, heads, tokens, SIZE, generator=generator).bfloat16()

    def passes(attend: Any, inputs: list[Any], slope: Any) -> list[Any]:
        inputs = [one.detach().requires_grad_() for one in inputs]
        output = attend(*inputs, how)
        return list(torch.autograd.grad(output, inputs, slope.to(output.dtype)))

    native = None
    if obstacle(torch.device("cpu")) is None:
        native = NativeOperations(Library(Kind(torch.bfloat16, HEADS, KEY_HEADS, SIZE)))

    def compiled(layout: Any, *parts: Any) -> Any:
        *tensors, how = parts
        query, key, value = (one.transpose(1, 2) for one in tensors)
        still = torch.ones(1, query.shape[1], 1, SIZE)
        return native.attend(layout, 0, query, key, value, how, (still, 0 * still))  # type: ignore[union-attr]

    measured: dict[str, dict[str, float]] = {}
    for name, shape in ROWS.items():
        tokens = sum(prompt + sum(completions) for prompt, completions in shape)
        inputs = [drawn(heads, tokens) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        slope = drawn(HEADS, tokens).transpose(1, 2)
        ways: dict[str, Any] = {"kernel": Segments(shape).attend, "batches": Batches(shape).attend}
        if native is not None:
            ways["compiled"] = partial(compiled, PackedLayout(shape))
        exact = passes(ways["kernel"], [one.double() for one in inputs], slope)[1]
        times: dict[str, list[float]] = {side: [] for side in ways}
        for _ in range(given.runs):
            for side, way in ways.items():
                for i in range(REPEATS):
                    began = clock()
                    passes(way, inputs, slope)
                    if i:  # the first pass finds the other side's memory
                        times[side].append(1e3 * (clock() - began))
        measured[name] = {side: round(statistics.median(values), 2) for side, values in times.items()}
        for side, way in ways.items():
            error = (passes(way, inputs, slope)[1].double() - exact).norm() / exact.norm()
            measured[name][f"{side}_error"] = round(float(error), 5)
        say(f"{name}: {measured[name]}")
    detail = {
        "dtype": "bfloat16",
        "runs": given.runs,
        "threads": torch.get_num_threads(),
        "measured": measured,
    }
    finish(given, detail, {name: round(one["kernel"] / one["batches"], 2) for name, one in measured.items()})


if __name__ == "__main__":
    main()
