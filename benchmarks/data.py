"""Measure the preparation of large preference data, and a journal with many completions.

    python benchmarks/data.py --output benchmarks/results/data.json [--pairs 60000] [--most 0] [--journal 0]

`--pairs` are prepared as `palate run dpo` does before its first step: rows are read and checked, rendered
with the chat template, tokenised and written to mapped files; then 1,000 random pairs are read, and the data
are prepared again, as a run that resumes does. Each size is a process of its own; its memory is the most that
the process has had, without and with the pages of mapped files. The texts are synthetic; with `--real FILE`
they are the pairs of that file, each with a number in its prompt. `--most` is a second, larger number of
pairs.
`--journal` is a number of completions, in chunks of 16.
"""

from __future__ import annotations

import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from common import anonymous_memory, arguments, finish, say

MODEL = "smollm2"
WORDS = (100, 160)
"""Fewest and most words of a synthetic answer."""


def pairs(count: int, real: Path | None) -> Iterator[dict[str, str]]:
    """Yield distinct pairs."""
    if real is not None:
        with gzip.open(real) if real.suffix == ".gz" else real.open("rb") as file:
            rows = [json.loads(line) for line in file]
        for i in range(count):
            row = rows[i % len(rows)]
            yield {"prompt": f"{row['prompt']} ({i})", "chosen": row["chosen"], "rejected": row["rejected"]}
        return
    from palate import data

    prompts = [prompt.text for prompt in data.read_prompts("everyday")]
    words, draw = " ".join(prompts).split(), random.Random(0)
    for i in range(count):
        chosen, rejected = (" ".join(draw.choices(words, k=draw.randint(*WORDS))) for _ in range(2))
        yield {"prompt": f"{prompts[i % len(prompts)]} ({i})", "chosen": chosen, "rejected": rejected}


class Peak:
    """The most memory that the process has had, looked at twenty times a second."""

    def __init__(self) -> None:
        self.most, self._over = 0, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            self.most = max(self.most, anonymous_memory())


def prepare(path: Path, place: Path) -> dict[str, float]:
    """Prepare a file of pairs in this process."""
    from palate.data import Account, scan_comparisons
    from palate.loops import records_on_disk, rows_on_disk
    from palate.methods import METHODS
    from palate.model.load import load_codec
    from palate.run import Run

    cfg = METHODS["dpo"].config.model_validate({"model": MODEL, "data": str(path), "output": str(place)})
    codec, peak = load_codec(cfg), Peak()
    with Run(cfg, method="dpo") as run:

        def once() -> Any:
            account = Account()
            rows = rows_on_disk(run, scan_comparisons, str(path), account)
            read = time.perf_counter()
            records = records_on_disk(run, codec, rows, str(path), account)
            return read, time.perf_counter(), records, sum(account.lengths) / len(account.lengths)

        began, used = time.perf_counter(), time.process_time()
        read, made, records, tokens = once()
        used = time.process_time() - used
        draw = random.Random(0)
        chosen = [draw.randrange(len(records)) for _ in range(1000)]
        looked = time.perf_counter()
        for index in chosen:
            records[index]
        each = (time.perf_counter() - looked) / len(chosen)
        again = time.perf_counter()
        once()
        resumed = time.perf_counter() - again
        size = sum(file.stat().st_size for file in (place / "prepared").iterdir())
    return {
        "pairs": len(records),
        "tokens": round(tokens, 1),
        "reading_seconds": round(read - began, 2),
        "tokenising_seconds": round(made - read, 2),
        "seconds": round(made - began, 2),
        "cpu_seconds": round(used, 2),
        "resumed_seconds": round(resumed, 2),
        "pair_microseconds": round(each * 1e6, 1),
        "memory_gb": round(peak.most / 1e9, 2),
        "resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "disk_gb": round(size / 1e9, 2),
        "data_gb": round(path.stat().st_size / 1e9, 2),
    }


def floor(path: Path, count: int = 5000) -> dict[str, float]:
    """Measure the tokenizer alone, with all cores, on the same texts."""
    from palate.methods import METHODS
    from palate.model.load import load_codec

    codec = load_codec(METHODS["dpo"].config.model_validate({"model": MODEL, "data": str(path)}))
    with path.open() as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    texts = [row[name] for row in rows for name in ("prompt", "chosen", "rejected")]
    backend = codec.tokenizer.backend_tokenizer
    began = time.perf_counter()
    for start in range(0, len(texts), 1500):
        backend.encode_batch(texts[start : start + 1500], add_special_tokens=False)
    return {"tokenizer_seconds_per_60k": round((time.perf_counter() - began) / len(rows) * 60_000, 2)}


def journal(path: Path, count: int) -> dict[str, float]:
    """Fill a journal, open it and ask it for chunks."""
    from palate.journal import Journal
    from palate.types import Completion, Prompt

    draw, size = random.Random(0), 16
    written = Journal(path)
    written._db.execute("PRAGMA synchronous = OFF")  # filling it is not measured
    for chunk in range(count // size):
        ids = [tuple(draw.randrange(50_000) for _ in range(100)) for _ in range(size)]
        logps = tuple(-draw.random() for _ in range(100))
        own = [[Completion("word " * 80, i, "eos", chunk, logps, logps)] for i in ids]
        prompts = [Prompt(f"prompt {chunk} {j}") for j in range(size)]
        written.keep_completions(f"chunk {chunk}", chunk, prompts, own)
    written.close()
    began = time.perf_counter()
    read = Journal(path)
    opened = time.perf_counter() - began
    times = []
    for _ in range(1000):
        key = f"chunk {draw.randrange(count // size)}"
        began = time.perf_counter()
        assert read.completions(key) is not None
        times.append(time.perf_counter() - began)
    times.sort()
    return {
        "completions": count,
        "opening_seconds": round(opened, 2),
        "median_ms": round(times[500] * 1e3, 3),
        "slowest_of_1000_ms": round(times[-1] * 1e3, 3),
        "gb": round(path.stat().st_size / 1e9, 2),
    }


def measured(place: Path, count: int, real: Path | None) -> dict[str, float]:
    """Prepare pairs in a process of its own."""
    path = place / "pairs.jsonl"
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in pairs(count, real))
    result: dict[str, float] = {}
    for work in ("floor", "prepare"):
        say(f"{work}: {count:,} pairs")
        command = [sys.executable, __file__, "--worker", work, str(path), str(place / f"run-{count}")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result |= json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure and print."""
    number: dict[str, Any] = {"type": int, "default": 0}
    given = arguments(
        str(__doc__),
        pairs={"type": int, "default": 60_000},
        most=number,
        journal=number,
        real={"type": Path},
        keep={"type": Path, "help": "a result whose other parts are kept"},
    )
    if given.worker:
        work, path, place = given.worker
        print(json.dumps(floor(Path(path)) if work == "floor" else prepare(Path(path), Path(place))))
        return
    kept = json.loads(given.keep.read_text()) if given.keep else {}
    detail = {name: kept[name] for name in ("synthetic", "real", "million", "journal") if name in kept}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        if given.pairs:
            detail["real" if given.real else "synthetic"] = measured(place, given.pairs, given.real)
        if given.most:
            detail["million"] = measured(place, given.most, given.real)
        if given.journal:
            detail["journal"] = journal(place / "journal.db", given.journal)
    last = next(reversed(detail.values())) if detail else {}
    with suppress(KeyError):
        last = {"seconds": last["seconds"], "memory_gb": last["memory_gb"]}
    finish(given, detail, last)


if __name__ == "__main__":
    main()
