"""Kill a worker and then the process of a pool on Ray, and check that each row is there exactly once.

A pool of 2,000 prompts with 8 completions each is made by two sampling workers and a worker with a reward
model. A sampling worker, then the scoring worker, then the process that started them are killed (SIGKILL).
The
same command resumes. The result is compared with a pool that one process makes without Ray. The model is tiny
and random, so that the experiment takes minutes.

    python experiments/soak_pool.py --output experiments/results/soak_pool.json      (`make soak-pool`)
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForSequenceClassification

from machine import machine
from palate.testing import byte_tokenizer, tiny_config, tiny_model
from soak import FAILED, check

LIMIT = 900
"""Seconds within which the next shards must appear."""


def processes() -> Iterator[tuple[int, int, str]]:
    """Yield the number, the parent's number and the command line of each process."""
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                parent = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has ended
                continue
            yield int(place.name), parent, words.strip()


def below(root: int) -> dict[int, str]:
    """Return the command lines of the processes that a process has started, directly or not."""
    every = {number: (parent, words) for number, parent, words in processes()}
    found = {root}
    while grown := {n for n, (parent, _) in every.items() if parent in found and n not in found}:
        found |= grown
    return {n: every[n][1] for n in found - {root} if n in every}


def listening(own: set[int]) -> list[str]:
    """Return the addresses on which processes listen for connections."""
    inodes = set()
    for number in own:
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{number}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.append(fields[1].partition(":")[0])
    return addresses


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}
"""127.0.0.1, ::1 and 127.0.0.1 as an IPv6 address, as Linux prints them."""


class Trial:
    """A pool in its own directory."""

    def __init__(self, root: Path, name: str, arguments: list[str]) -> None:
        self.directory = root / name
        self._log = root / f"{name}.log"
        self._command = [sys.executable, "-m", "palate", "pool", *arguments, "--output", str(self.directory)]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the pool, or resume it."""
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdout=log, stderr=log)

    def finished(self) -> dict[str, int]:
        """Return the finished shards with the time of their last change in nanoseconds."""
        return {path.name: path.stat().st_mtime_ns for path in (self.directory / "shards").glob("*.parquet")}

    def wait(self, shards: int, process: subprocess.Popen[bytes]) -> None:
        """Wait until so many shards are finished."""
        until = time.monotonic() + LIMIT
        while len(self.finished()) < shards:
            assert process.poll() is None, self._log.read_text()[-2000:]
            assert time.monotonic() < until, f"no {shards} shards after {LIMIT} s"
            time.sleep(1)

    def rows(self) -> dict[tuple[int, int], tuple[Any, ...]]:
        """Return text, tokens and reward of each row; a row that is there twice is an error."""
        table = pq.read_table(self.directory / "shards")
        names = ("completion", "token_ids", "reward", "error")
        keys = list(zip(table["prompt_row"].to_pylist(), table["sample"].to_pylist(), strict=True))
        values = list(zip(*(table[name].to_pylist() for name in names), strict=True))
        twice = [key for key, count in Counter(keys).items() if count > 1]
        check(f"{self.directory.name}: {len(keys)} rows, {len(twice)} of them repeated", not twice)
        return dict(zip(keys, values, strict=True))


def kill(process: subprocess.Popen[bytes], name: str) -> str:
    """Kill a worker of a pool by the name of its class; return what was killed."""
    number, words = next((n, w) for n, w in below(process.pid).items() if name in w)
    os.kill(number, signal.SIGKILL)
    return words[:60]


def until_ended(left: dict[int, str], limit: float) -> float:
    """Wait until processes have ended; return the seconds."""
    began = time.perf_counter()
    while any(left.get(n) == words for n, _, words in processes()) and time.perf_counter() - began < limit:
        time.sleep(0.5)
    return time.perf_counter() - began


def killed(trial: Trial, shards: int) -> dict[str, Any]:
    """Run a pool through three kills, and return what happened."""
    process = trial.start()
    trial.wait(shards // 5, process)
    open_to_others = [a for a in listening({process.pid, *below(process.pid)}) if a not in LOOPBACK]
    check(f"all ports are on the loopback address (not: {open_to_others})", not open_to_others)
    kills = [kill(process, "SamplingWorker")]
    trial.wait(2 * shards // 5, process)
    kills.append(kill(process, "ScoringWorker"))
    trial.wait(3 * shards // 5, process)
    left = below(process.pid)
    process.kill()
    process.wait()
    kills.append("the process that started the pool")
    done, waited = trial.finished(), {}
    for name, own in (("workers", "MapWorker"), ("all", "")):
        waited[name] = until_ended({n: words for n, words in left.items() if own in words}, LIMIT)
        check(f"Ray's {name} end in {waited[name]:.0f} s", waited[name] < LIMIT)
    check("resumes and ends well", trial.start().wait(timeout=2 * LIMIT) == 0)
    after = trial.finished()
    again = sum(after[name] != changed for name, changed in done.items())
    check(f"{again} of {len(done)} shards that were finished before the kill are written again", again == 0)
    return {
        "killed": kills,
        "shards_finished_at_the_kill": len(done),
        "of_these_written_again": again,
        "seconds_until_workers_ended": round(waited["workers"]),
        "seconds_until_all_of_ray_ended": round(waited["all"]),
        "ports_open_to_other_machines": len(open_to_others),
    }


def reward_model(directory: Path) -> str:
    """Save a tiny random reward model, and return its reward."""
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1)).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return f"model:{directory}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=2000)
    given = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "prompts": given.prompts, "n": 8, "max_new_tokens": 32}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = tiny_model(root / "model", initializer_range=0.2)
        lines = [json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(given.prompts)]
        (root / "prompts.jsonl").write_text("".join(lines))
        arguments = [
            *(str(root / "prompts.jsonl"), "--model", model, "--reward", reward_model(root / "reward")),
            *(
                "--n",
                "8",
                "--max-new-tokens",
                "32",
                "--dtype",
                "float32",
                "--device",
                "cpu",
                "--threads",
                "1",
            ),
        ]
        shards = -(-given.prompts // 64)
        began = time.perf_counter()
        trial = Trial(root, "killed", [*arguments, "--ray", "--workers", "2"])
        figures |= {"shards": shards, **killed(trial, shards)}
        figures["seconds_on_ray"] = round(time.perf_counter() - began)
        rows = trial.rows()
        expected = {(row, sample) for row in range(given.prompts) for sample in range(8)}
        check(f"each of {len(expected)} rows is there", rows.keys() == expected)
        whole, began = Trial(root, "whole", arguments), time.perf_counter()
        check("a pool in one process ends well", whole.start().wait(timeout=2 * LIMIT) == 0)
        figures["seconds_in_one_process"] = round(time.perf_counter() - began)
        alone = whole.rows()
        different = [key for key in expected if rows[key][:2] != alone[key][:2]]
        check(f"{len(different)} rows have other tokens than in one process", not different)
        figures |= {"rows": len(rows), "rows_with_other_tokens_than_in_one_process": len(different)}
    figures["failed"] = FAILED
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{len(FAILED)} failed, {given.output}")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
