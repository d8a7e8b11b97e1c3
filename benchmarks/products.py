"""Measure the rates of the products of a layer: each size of the embedded model, with its gradients.

    python benchmarks/products.py --output benchmarks/results/products.json

Micro-batches have 1,000 and 1,400 tokens. Each product has its own weights and arguments, as in 30 layers,
so they come from memory; `in the cache` repeats a single forward product. `of weights, compiled` is the
gradient of a weight as `--compile on` computes it with AMX. The last line has the mean rate of an update
with 1,400 tokens, weighted by operations, over the peak: the share that a learner could reach if it computed
nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import arguments, compute_dtype, finish, gemm_peak, median, on_gpu

TOKENS, LAYERS = (1000, 1400), 30
SIZES = {"query, output": (576, 576), "key, value": (192, 576), "gate, up": (1536, 576), "down": (576, 1536)}
"""Outputs and inputs of the linear layers of SmolLM2-135M; there are two of each but the last."""
REPEATS = 7


def rate(work: Callable[[], Any], operations: float) -> float:
    """Return the median rate of some work in GFLOP/s."""
    rows = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        rows.append({"rate": operations / (time.perf_counter() - began) / 1e9})
    return round(median(rows, "rate"))


def operations_of(dtype: Any) -> Any:
    """Return the compiled operations for some layers; None without a compiler or matrix units."""
    import torch

    from palate.model.compiling import obstacle
    from palate.model.fast.native import Kind, Library
    from palate.model.fast.native_layers import NativeOperations

    if dtype != torch.bfloat16 or obstacle(torch.device("cpu")) is not None:
        return None
    library = Library(Kind(dtype, 9, 3, 64))
    return NativeOperations(library) if library.has_tiles() else None


def measured(tokens: int, outputs: int, inputs: int, dtype: Any) -> dict[str, float]:
    """Return the rates of a product and its gradients."""
    import torch

    def drawn(*size: int) -> list[Any]:
        return [torch.randn(*size).to(dtype) for _ in range(LAYERS)]

    weights, states, results = drawn(outputs, inputs), drawn(tokens, inputs), drawn(tokens, outputs)
    operations = 2.0 * tokens * outputs * inputs * LAYERS
    every = list(zip(weights, states, results, strict=True))

    def forward() -> None:
        for weight, state, result in every:
            torch.mm(state, weight.t(), out=result)

    def of_states() -> None:
        for weight, state, result in every:
            torch.mm(result, weight, out=state)

    def of_weights() -> None:
        for weight, state, result in every:
            torch.mm(result.t(), state, out=weight)

    native = operations_of(dtype)

    def of_weights_compiled() -> None:
        for _, state, result in every:
            native.weight_gradient(result, state)

    def again() -> None:
        weight, state, result = every[0]
        for _ in range(LAYERS):
            torch.mm(state, weight.t(), out=result)

    ways = {
        "in the cache": again,
        "forward": forward,
        "of states": of_states,
        "of weights": of_weights,
        **({} if native is None else {"of weights, compiled": of_weights_compiled}),
    }
    return {name: rate(way, operations) for name, way in ways.items()}


def main() -> None:
    given = arguments(__doc__ or "", dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]})
    if on_gpu():
        raise SystemExit("products.py measures processors; hide the GPU from torch")
    import torch

    dtype = compute_dtype(given.dtype)
    rates = {
        tokens: {name: measured(tokens, *size, getattr(torch, dtype)) for name, size in SIZES.items()}
        for tokens in TOKENS
    }
    peak = gemm_peak(dtype) / 1e9
    operations = seconds = 0.0
    for name, (outputs, inputs) in SIZES.items():
        one = outputs * inputs * (1 if name == "down" else 2)
        operations += 4 * one  # the reference's pass, and forward and backward
        own = rates[TOKENS[-1]][name]
        of_weights = own.get("of weights, compiled", own["of weights"])
        seconds += one * (2 / own["forward"] + 1 / own["of states"] + 1 / of_weights)
    detail = {"dtype": dtype, "rates": rates, "gemm_peak_gflops": round(peak)}
    finish(given, detail, {"update_share": round(operations / seconds / peak, 2)})


if __name__ == "__main__":
    main()
