"""Compare a step of sampling with and without `--compile on`, on a processor.

The model is the embedded one. For 32 and 64 rows (16 prompts of about 40 tokens with 2 and 4 completions
each), two decoders, one plain and one compiled, sample the same completions. They take turns step by step in
one process, so noise affects both. The times are medians over all steps after the first.

    python benchmarks/compiled.py --json

The last line has the plain time over the compiled one. `parts` are milliseconds of a profiled step: products
with weights, products of attention, and the rest. `compiling` is the time to compile with an empty directory
of compiled code, and again in a new process with the same directory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from common import arguments, finish, on_gpu, prompts, say

PROMPTS, NEW = 16, 48
PROFILED = 8
"""Number of steps under the profiler."""


def prepared(dtype: str) -> tuple[Any, Any]:
    """Load the model in a number format; return it and its packed layers."""
    from palate.config import ModelConfig
    from palate.model import load_model
    from palate.quiet import quiet_libraries

    quiet_libraries()
    model = load_model(ModelConfig.model_validate({"dtype": dtype, "device": "cpu"}), trainable=False)
    fused = model.engine.fused(model)
    if fused is None:
        raise SystemExit("this build of torch has no packed products, which compiled steps need")
    return model, fused


def compile_alone(dtype: str) -> None:
    """Print the seconds that a new process takes to compile a step."""
    import torch

    from palate.model.fast.native import library_of

    _, fused = prepared(dtype)
    began = time.perf_counter()
    with torch.no_grad():
        library = library_of(fused.network)
    print("failed" if library is None else round(time.perf_counter() - began, 1))


def compiling(dtype: str) -> dict[str, float]:
    """Return the seconds to compile: with an empty directory of compiled code, and with a full one."""
    command = [sys.executable, __file__, "--worker", "compile", dtype]
    with tempfile.TemporaryDirectory() as place:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": place}
        found = [
            subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
            for _ in range(2)
        ]
    return dict(zip(("cold", "warm"), (float(text.splitlines()[-1]) for text in found), strict=True))


def decoder(model: Any, fused: Any, n: int, *, compiled: bool) -> Any:
    """Return the iterator over the steps of one side."""
    import numpy as np

    from palate.config import Sampling
    from palate.model.fast.decode import Decoder
    from palate.model.fast.head import LMHead
    from palate.model.fast.native import library_of
    from palate.model.fast.native_step import NativeStep
    from palate.model.rows import Row
    from palate.types import Prompt

    source = np.random.default_rng(0)
    ids = [tuple(model.codec.prompt_ids(Prompt(text))) for text in prompts(PROMPTS, 40)]
    groups = [[Row(one, source.random(NEW)) for _ in range(n)] for one in ids]
    head = LMHead.of(model.network)
    assert head is not None
    library = library_of(model.network) if compiled else None
    if compiled and library is None:
        raise SystemExit("compiling failed; the log says why")
    options = Sampling(max_new_tokens=NEW, min_new_tokens=NEW)
    longest = max(map(len, ids))
    return Decoder(
        model.network, head, model.codec, options,
        slots=PROMPTS, rows=n, longest=longest, fused=fused,
        compiled=None if library is None else NativeStep(fused, library),
    ).run(iter(groups))  # fmt: skip


def compare(model: Any, fused: Any, n: int, runs: int) -> dict[str, Any]:
    """Return the milliseconds of a step of both sides, and their parts."""
    import torch

    times: dict[str, list[float]] = {"plain": [], "compiled": []}
    parts = {}
    with torch.no_grad():
        for _ in range(runs):
            sides = {name: decoder(model, fused, n, compiled=name == "compiled") for name in times}
            for i in range(NEW - 1):
                for name, steps in sides.items():
                    began = time.perf_counter()
                    next(steps)
                    if i > 1:
                        times[name].append(1e3 * (time.perf_counter() - began))
        for name in times:
            parts[name] = profiled(decoder(model, fused, n, compiled=name == "compiled"))
    step = {name: round(statistics.median(values), 1) for name, values in times.items()}
    return {**step, "ratio": round(step["plain"] / step["compiled"], 2), "parts": parts}


def profiled(steps: Any) -> dict[str, float]:
    """Return the milliseconds of the parts of a step, under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(NEW // 2):
        next(steps)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        whole = 1e3 * (time.perf_counter() - began)
    own = {event.key: event.self_cpu_time_total / 1e3 for event in found.key_averages()}
    names = {
        "products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::addmm_"),
        "attention": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    }
    parts = {kind: sum(own.get(name, 0.0) for name in some) for kind, some in names.items()}
    parts["rest"] = whole - sum(parts.values())
    calls = sum(event.count for event in found.key_averages() if event.key.startswith(("aten::", "mkldnn::")))
    return {**{k: round(v / PROFILED, 1) for k, v in parts.items()}, "operations": calls // PROFILED}


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtypes={"nargs": "+", "default": ["bfloat16", "float32"], "choices": ["bfloat16", "float32"]},
    )
    if given.worker:
        compile_alone(given.worker[1])
        return
    if on_gpu():
        raise SystemExit("compiled.py compares steps on a processor; hide the GPU from torch")
    import torch

    detail: dict[str, Any] = {"dtype": " and ".join(given.dtypes), "runs": given.runs}
    detail |= {"threads": torch.get_num_threads(), "steps": {}, "compiling": {}}
    for dtype in given.dtypes:
        detail["compiling"][dtype] = compiling(dtype)
        say(f"{dtype}: {detail['compiling'][dtype]}")
        model, fused = prepared(dtype)
        for n in (2, 4):
            found = detail["steps"].setdefault(dtype, {})[str(PROMPTS * n)] = compare(
                model, fused, n, given.runs
            )
            say(f"{dtype}, {PROMPTS * n} rows: {found}")
    last = {
        f"{dtype} {rows}": one["ratio"]
        for dtype, some in detail["steps"].items()
        for rows, one in some.items()
    }
    finish(given, detail, last)


if __name__ == "__main__":
    main()
