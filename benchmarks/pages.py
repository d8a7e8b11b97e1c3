"""Measure what memory in large pages gains: one step of online DPO with and without.

    python benchmarks/pages.py --output benchmarks/results/pages.json

Each side takes the steps of `palate live` of online_dpo.py in its own process, in turns. `freed` gives freed
memory back to the system, as the C library does by itself. `small pages` is Palate's default, which keeps it;
pages have 4 KiB on x86. `large pages` has the C library's tunable that makes
it ask Linux for pages of 2 MiB. The last line has the times of the first and the
last over that of the second, for sampling and for learning.
"""

from __future__ import annotations

from typing import Any

from common import (
    COMPILE,
    Side,
    arguments,
    compiling,
    compute_dtype,
    finish,
    in_turns,
    median,
    on_gpu,
    say,
    serve,
)
from online_dpo import SHAPES, palate_worker

from palate.model import load

LARGE = "glibc.malloc.hugetlb=1"
SIDES = {"freed": {}, "small pages": {}, "large pages": {"GLIBC_TUNABLES": LARGE}}
"""Environment of each side."""


def main() -> None:
    given = arguments(
        __doc__ or "",
        dtype={"default": "auto", "choices": ["auto", "bfloat16", "float32"]},
        shape={"default": "short", "choices": list(SHAPES)},
        compile=COMPILE,
    )
    if given.worker:
        name, *rest = given.worker
        if name == "freed":
            load.keep_freed_memory = lambda device: False
        serve(palate_worker(*rest))
        return
    if on_gpu():
        raise SystemExit("pages.py measures processors; hide the GPU from torch")
    dtype = compute_dtype(given.dtype)
    compiled = compiling(given.compile)
    say(given.shape)
    sides = [
        Side(name, "pages.py", name, "live", given.shape, dtype, compiled, environment=own)
        for name, own in SIDES.items()
    ]
    rows = in_turns(sides, given.runs)
    for side in sides:
        side.close()
    keys = ("sampling_seconds", "learning_seconds", "memory_gb")
    measured = {name: {key: median(own, key) for key in keys} for name, own in rows.items()}
    detail: dict[str, Any] = {
        "dtype": dtype, "shape": given.shape, "runs": given.runs, "rows": rows, "measured": measured
    }  # fmt: skip
    last = {
        f"{name.replace(' ', '_')}_{key.removesuffix('_seconds')}": round(
            measured[name][key] / measured["small pages"][key], 2
        )
        for name in ("freed", "large pages")
        for key in keys[:2]
    }
    finish(given, detail, last)


if __name__ == "__main__":
    main()
