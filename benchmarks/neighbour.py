"""Measure what a busy program costs a sampling step, with and without the bound on spinning threads.

    python benchmarks/neighbour.py --output benchmarks/results/neighbour.json

Each side samples 16 prompts of about 40 tokens with 2 completions of 16 tokens with the embedded model, in
its own process. `bounded` is Palate's default, `unbounded` has the default of GNU's OpenMP, and `one thread`
is `--threads 1`. All sides take turns, first on the idle machine, then beside one process that is always
busy. The numbers are milliseconds per step: the time of the whole piece of work divided by 16. The last line
has the busy time of each side over its idle time.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from common import (
    COMPILE,
    Side,
    arguments,
    clock,
    compiling,
    compute_dtype,
    finish,
    in_turns,
    median,
    on_gpu,
    prompts,
    say,
    serve,
)

PROMPTS, TOKENS, COMPLETIONS, NEW = 16, 40, 2, 16

SIDES = {
    "bounded": {},
    "unbounded": {"GOMP_SPINCOUNT": "300000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""Environment of each side. 300,000 rounds are the default of GNU's OpenMP."""


def worker(dtype: str, compiled: str) -> Any:
    """Sample, and return the milliseconds per step."""
    from palate.config import ModelConfig, Sampling
    from palate.model import load_model
    from palate.model.rollouts import sample
    from palate.quiet import quiet_libraries
    from palate.types import Prompt

    quiet_libraries()
    cfg = ModelConfig.model_validate({"dtype": dtype, "compile": compiled})
    model = load_model(cfg, trainable=False)
    asked = [Prompt(text) for text in prompts(PROMPTS, TOKENS)]
    options = Sampling(max_new_tokens=NEW, min_new_tokens=NEW)

    def work(seed: int = 0) -> dict[str, float]:
        began = clock()
        sample(model, asked, COMPLETIONS, options, seed=seed, version=0)
        return {"step_ms": round(1e3 * (clock() - began) / NEW, 1)}

    return work


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        compile=COMPILE,
    )
    if given.worker:
        serve(worker(*given.worker))
        return
    if on_gpu():
        raise SystemExit("neighbour.py measures processors; hide the GPU from torch")
    dtype = compute_dtype(given.dtype)
    compiled = compiling(given.compile)
    sides = [Side(name, "neighbour.py", dtype, compiled, environment=own) for name, own in SIDES.items()]
    detail: dict[str, Any] = {"dtype": dtype, "compile": compiled, "runs": given.runs, "rows": {}}
    for state in ("idle", "busy"):
        say(state)
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if state == "busy" else None
        try:
            detail["rows"][state] = in_turns(sides, given.runs)
        finally:
            if other is not None:
                other.kill()
                other.wait()
    for side in sides:
        side.close()
    detail["measured"] = {
        name: {state: median(rows[name], "step_ms") for state, rows in detail["rows"].items()}
        for name in SIDES
    }
    finish(
        given, detail, {name: round(one["busy"] / one["idle"], 2) for name, one in detail["measured"].items()}
    )


if __name__ == "__main__":
    main()
