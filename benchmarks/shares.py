"""Profile Palate's sampler and learner: the share of time by kind of operation.

The script runs one step of `online_dpo.py`, with the state of its main result, under the profiler, on the
shape `short` or, with `--shape long`, on the other shape. The profiler slows down small operations, so the
shares of operations other than matrix products are upper bounds.

    python benchmarks/shares.py --json

The last line has each stage's share of time in matrix products. `between operations` is the time outside all
operations, mostly in the interpreter.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common import COMPILE, arguments, compiling, compute_dtype, finish, gemm_peak, on_gpu, say
from online_dpo import SHAPES, PalateStep

KINDS: dict[str, tuple[str, ...]] = {
    "matrix products": (
        "mm", "addmm", "addmm_", "mkldnn_linear", "_addmm_activation", "_linear_pointwise",
        "weight_gradients", "few_rows",
    ),
    "products of attention": (
        "bmm", "baddbmm", "baddbmm_", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention_for_cpu_backward", "attend", "attend_row", "attend_row_back",
    ),
    "softmax (attention, drawing, head)": (
        "_softmax", "_softmax_backward_data", "cumsum", "searchsorted", "gather", "scatter_add_", "amax",
        "logsumexp", "topk", "sort", "argmax", "exp", "log", "draw", "score_targets", "slope",
    ),
    "copies": (
        "copy_", "cat", "index_select", "index", "index_put_", "index_copy_", "_index_put_impl_", "fill_",
    ),
    "optimizer": ("_fused_adamw_", "_foreach_norm", "squares", "accumulate", "narrow"),
}  # fmt: skip
"""Operations by kind; all others are `other small operations`."""


def kind_of(name: str) -> str:
    """Return the kind of an operation in the profiler's list."""
    return next((kind for kind, names in KINDS.items() if name in names), "other small operations")


def profiled(work: Callable[[], Any]) -> dict[str, float]:
    """Return the share of each kind in the wall time of `work`, by the operations' own time."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    shares = dict.fromkeys((*KINDS, "other small operations"), 0.0)
    for event in found.key_averages():
        # Autograd's own events enclose other operations, which are counted themselves.
        library, _, name = event.key.partition("::")
        if library in ("aten", "mkldnn", "palate"):
            shares[kind_of(name)] += event.self_cpu_time_total / 1e6 / seconds
    shares["between operations"] = max(0.0, 1 - sum(shares.values()))
    return {"seconds": round(seconds, 2), **{kind: round(share, 3) for kind, share in shares.items()}}


def name_functions(network: Any) -> None:
    """Let the profiler see the compiled functions, as operations of `palate`."""
    from torch.profiler import record_function

    from palate.model.fast.native import SIGNATURES, library_of

    library = library_of(network)
    if library is None:
        raise SystemExit("compiling failed; the log says why")

    def named(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            with record_function(f"palate::{name}"):
                return function(*arguments)

        return call

    for name in SIGNATURES:
        setattr(library, name, named(name, getattr(library, name)))


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        shape={"default": "short", "choices": list(SHAPES)},
        compile=COMPILE,
    )
    if on_gpu():
        raise SystemExit("shares.py times a processor's operations; hide the GPU from torch")
    dtype = compute_dtype(given.dtype)
    compiled = compiling(given.compile)
    step = PalateStep("float32" if dtype == "bfloat16" else "live", given.shape, dtype, compiled)
    step.learn(step.sample(0))  # warming up; makes the optimizer's state
    if compiled == "on":
        name_functions(step.policy.model.network)
    detail: dict[str, Any] = {
        "dtype": dtype, "shape": given.shape, "compile": compiled, **SHAPES[given.shape]
    }  # fmt: skip
    groups: list[Any] = []
    for stage, operations, work in (
        ("sampler", 1, lambda: groups.extend(step.sample(1))),
        ("learner", 4, lambda: step.learn(groups)),  # the reference's pass; forward and backward
    ):
        say(stage)
        found = profiled(work)
        forward = step.forward_operations(groups, sampling=stage == "sampler")
        found["gflops"] = round(operations * forward / found["seconds"] / 1e9, 1)
        detail[stage] = found
    detail["gemm_peak_gflops"] = round(gemm_peak(dtype) / 1e9)
    finish(given, detail, {stage: detail[stage]["matrix products"] for stage in ("sampler", "learner")})


if __name__ == "__main__":
    main()
