"""Kill runs many times and check that no work is lost and no annotation is paid for twice.

An `oaif` run is killed (SIGKILL) 20 times and a `dpo` run 10 times at random moments. Each time the same
command resumes it, and the result is compared with an undisturbed run. Then other failures are tested: a full
disk, a flipped byte in a checkpoint, a truncated journal, a clock that jumps, and a moved directory.

    python experiments/soak.py --output experiments/results/soak.json        (`make soak`)
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

REWARD = """
import time

def vowels(completions, completion_ids):
    time.sleep(0.05)
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(t.count(v) for v in "aeiou") + len(ids) / 100 for t, ids in zip(texts, completion_ids)]
"""
FAILED: list[str] = []
COUNTS: Counter[str] = Counter()
PLACES = ("checkpoint", "journal", "sample", "annotate", "learn", "evaluate", "resume", "timer")


def check(what: str, ok: bool) -> bool:
    """Print the result of a check, and record it if it failed."""
    print(f"  {'ok    ' if ok else 'FAILED'} {what}", flush=True)
    if not ok:
        FAILED.append(what)
    return ok


# -- The process that is killed -------------------------------------------------------------------------


def child(arguments: list[str]) -> int:
    """Run `palate` with a log of its stages and with a timer that kills it."""
    log = os.open(os.environ["SOAK_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    place = os.open(os.environ["SOAK_PLACE"], os.O_WRONLY | os.O_CREAT)

    def note(text: str) -> None:
        os.write(log, f"{text}\n".encode())

    def at(where: str) -> None:
        os.pwrite(place, where.ljust(16).encode(), 0)

    at("starting")
    if os.environ.get("SOAK_CLOCK"):
        jumping_clock()

    from palate import cli
    from palate.annotate import FunctionScorer
    from palate.annotate.judges.ledger import Ledger
    from palate.journal import Journal
    from palate.learn import Learner, Optimizer
    from palate.model.fast.decode import Decoder
    from palate.run import Run, shared
    from palate.run.checkpoints import Checkpoints

    def wrap(cls: Any, name: str, where: str, after: Callable[..., None] | None = None) -> None:
        plain = getattr(cls, name)

        @functools.wraps(plain)
        def wrapped(self: Any, *given: Any, **options: Any) -> Any:
            at(where)
            strike(where)
            found = plain(self, *given, **options)
            if after is not None:
                after(found, *given)
            at("between")
            return found

        setattr(cls, name, wrapped)

    def looked_up(found: Any, key: str) -> None:
        if found is None:
            note(f"sample {key}")

    wrap(Journal, "completions", "journal", looked_up)
    wrap(Journal, "keep_completions", "journal", lambda _, key, *__: note(f"kept {key}"))
    wrap(Journal, "keep_rewards", "journal")
    wrap(Journal, "add_metrics", "journal")
    wrap(Decoder, "run", "sample")
    wrap(FunctionScorer, "__call__", "annotate")
    wrap(Ledger, "done", "judge")
    wrap(Learner, "update", "learn")
    wrap(Learner, "measure", "evaluate")
    wrap(Optimizer, "step", "learn", lambda *_: note("step"))
    wrap(Checkpoints, "save", "checkpoint")
    wrap(shared, "_write_part", "part")
    wrap(Checkpoints, "restore", "resume")
    wrap(Run, "__enter__", "starting", lambda *_: strike("timer"))
    return cli.main(arguments)


def strike(where: str) -> None:
    """Kill this process some milliseconds after it reaches the given place for the n-th time."""
    place, _, rest = os.environ.get("SOAK_KILL", "").partition(":")
    if place != where:
        return
    COUNTS[where] += 1
    n, _, seconds = rest.partition(":")
    if COUNTS[where] == int(n):
        timer = threading.Timer(float(seconds), lambda: os.kill(os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()


def jumping_clock() -> None:
    """Make every clock that a program can read jump back and forth by hours."""
    draw = random.Random(0)
    for name in ("time", "perf_counter", "monotonic"):
        plain = getattr(time, name)
        setattr(time, name, lambda plain=plain: plain() + draw.uniform(-7200, 7200))


# -- The parent process ---------------------------------------------------------------------------------


class Trial:
    """Starts a command repeatedly in its own directory, and keeps its logs."""

    def __init__(self, root: Path, name: str, arguments: list[str]) -> None:
        self.root, self.name, self.arguments = root, name, arguments
        self.directory = root / name
        self.log, self.place = root / f"{name}.log", root / f"{name}.place"
        self.log.touch()

    def start(self, kill: str = "", clock: str = "") -> subprocess.CompletedProcess[str]:
        """Start once. `kill` (PLACE:N:SECONDS) kills it SECONDS after it reaches PLACE for the N-th time."""
        given = {"SOAK_LOG": self.log, "SOAK_PLACE": self.place, "SOAK_KILL": kill, "SOAK_CLOCK": clock}
        return subprocess.run(
            [sys.executable, __file__, "--child", *self.arguments, "--output", str(self.directory)],
            env={**os.environ, **{k: str(v) for k, v in given.items()}},
            capture_output=True,
            text=True,
            check=False,
        )

    def lines(self, word: str) -> list[str]:
        """Return the log entries with a given word."""
        return [line for line in self.log.read_text().splitlines() if line.split()[0] == word]

    def committed(self) -> set[str]:
        """Return the chunks in the journal."""
        if not (self.directory / "journal.db").exists():
            return set()
        with sqlite3.connect(f"file:{self.directory / 'journal.db'}?mode=ro", uri=True) as db:
            try:
                return {key for (key,) in db.execute("SELECT key FROM chunks")}
            except sqlite3.OperationalError:  # killed before it had tables
                return set()

    def weights(self) -> dict[str, bytes]:
        """Return the files of all learners in the last checkpoint, without the parts that name the run."""
        last = max((self.directory / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
        files = last.rglob("*.safetensors")
        return {path.relative_to(last).as_posix(): path.read_bytes() for path in files}


def kill_often(trial: Trial, whole: Trial, times: int, draw: random.Random) -> dict[str, Any]:
    """Kill and resume a run `times` times, then let it finish, and compare the result with `whole`."""
    places: Counter[str] = Counter()
    kills = repeated = 0
    strange = ("evaluate",) if trial.name.startswith("oaif") else ("sample", "annotate")
    told = [place for place in PLACES if place not in strange]
    while kills < times:
        before, noted = trial.committed(), len(trial.lines("sample"))
        where = told[kills % len(told)]
        # Long enough that the work at this place has started, or has just finished.
        wait = draw.uniform(0, 1.0 if where == "timer" else 0.03)
        ended = trial.start(
            kill=f"{where}:{1 if where in ('timer', 'resume') else draw.randint(1, 3)}:{wait}"
        )
        if ended.returncode == 0:  # the run finished before it reached the place that often
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        kills += 1
        places[trial.place.read_bytes().split()[0].decode()] += 1
        repeated += sum(line.split()[1] in before for line in trial.lines("sample")[noted:])
        with sqlite3.connect(trial.directory / "journal.db") as db:
            (verdict,) = db.execute("PRAGMA integrity_check").fetchone()
        check(f"{trial.name}: kill {kills} {where}: the journal is whole", verdict == "ok")
    before, noted = trial.committed(), len(trial.lines("sample"))
    last = trial.start()
    repeated += sum(line.split()[1] in before for line in trial.lines("sample")[noted:])
    check(f"{trial.name}: killed {kills} times, at {dict(places)}", kills == times)
    check(f"{trial.name}: ended well", last.returncode == 0)
    same = trial.weights() == whole.weights()
    check(f"{trial.name}: weights and optimizer are bitwise those of the undisturbed run", same)
    check(f"{trial.name}: no committed chunk was computed again ({repeated})", repeated == 0)
    steps, chunks = (len(trial.lines(word)) for word in ("step", "sample"))
    steps_whole, chunks_whole = (len(whole.lines(word)) for word in ("step", "sample"))
    check(
        f"{trial.name}: {steps - steps_whole} steps and {chunks - chunks_whole} chunks repeated in {kills} "
        "resumes, at most one each",
        steps - steps_whole <= kills and chunks - chunks_whole <= kills,
    )
    return {
        "kills": kills,
        "killed_at": dict(places),
        "bitwise": same,
        "committed_chunks_repeated": repeated,
        "steps": steps_whole,
        "steps_repeated": steps - steps_whole,
        "chunks": chunks_whole,
        "chunks_repeated": chunks - chunks_whole,
    }


def misfortunes(root: Path, arguments: list[str], whole: Trial) -> None:
    """Test all other failures."""
    trial = Trial(root, "byte", arguments)
    trial.start(kill="checkpoint:4:0.01")
    steps = sorted((trial.directory / "checkpoints").glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
    state = steps[-1] / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    refused = trial.start()
    said = refused.stderr.strip().splitlines()[-1]
    check(f"a flipped byte is refused: {said[:90]}...", refused.returncode == 2 and "damaged" in said)
    shutil.rmtree(steps[-1])
    check("without that checkpoint it goes on", trial.start().returncode == 0)
    check("and ends in the same weights", trial.weights() == whole.weights())

    trial = Trial(root, "truncated", arguments)
    trial.start(kill="checkpoint:4:0.01")
    journal = trial.directory / "journal.db"
    good = journal.read_bytes()
    journal.write_bytes(good[: len(good) * 2 // 3])
    refused = trial.start()
    said = refused.stderr.strip().splitlines()[-1]
    check(f"a truncated journal is refused: {said[:90]}...", refused.returncode == 2 and "damaged" in said)
    journal.write_bytes(good)
    moved = trial.directory.rename(root / "elsewhere")
    trial.directory = moved
    check("with the journal back, and moved to another directory, it goes on", trial.start().returncode == 0)
    check("and ends in the same weights", trial.weights() == whole.weights())

    trial = Trial(root, "clock", arguments)
    trial.start(kill="checkpoint:4:0.01", clock="1")
    check("a clock that jumps by hours stops nothing", trial.start(clock="1").returncode == 0)
    check("and changes no weight", trial.weights() == whole.weights())


def full_disk(root: Path, arguments: list[str], whole: Trial) -> bool:
    """Test a disk of a few MB that fills up during a run. This needs permission to mount one."""
    disk = root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        print("  skipped: a disk that fills up (no permission to mount one)")
        return False
    try:
        trial = Trial(root, "full", arguments)
        trial.directory = disk / "run"
        failed = trial.start()
        said = failed.stderr.strip().splitlines()[-1]
        check(
            f"a full disk ends a run with a sentence: {said[:110]}...",
            failed.returncode == 2 and "full" in said,
        )
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        check("with more room it goes on", trial.start().returncode == 0)
        check("and ends in the same weights", trial.weights() == whole.weights())
        check(
            "having computed no committed chunk twice", len(trial.lines("kept")) == len(whole.lines("kept"))
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return True


def prepare(root: Path, *, steps: int = 30) -> dict[str, list[str]]:
    """Create a small model, data and a reward; return the command lines of both runs."""
    from palate.testing import tiny_model

    model = tiny_model(root / "model", initializer_range=0.2, hidden_size=128, intermediate_size=256)
    (root / "reward.py").write_text(REWARD)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(200)]
    texts = [" ".join(draw.choices(words, k=draw.randint(2, 8))) for _ in range(144)]
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts[:64]))
    pairs = [{"prompt": t, "chosen": t.upper(), "rejected": texts[-1 - i]} for i, t in enumerate(texts[:128])]
    (root / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    common = [
        "--model",
        model,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--checkpoint-every",
        "1",
        "--threads",
        "1",
    ]
    oaif = ["run", "oaif", "--data", f"{root}/prompts.jsonl", "--eval-data", f"{root}/prompts.jsonl"]
    oaif += ["--reward", f"{root}/reward.py:vowels", "--n", "4", "--batch-size", "8", "--steps", str(steps)]
    oaif += ["--max-new-tokens", "16", "--sampling-rows", "2", "--no-lora", "--lr", "1e-3", *common]
    dpo = ["run", "dpo", "--data", f"{root}/pairs.jsonl", "--eval-data", f"{root}/pairs.jsonl"]
    dpo += [
        "--epochs",
        "4",
        "--batch-size",
        "4",
        "--eval-every",
        "16",
        "--lr",
        "1e-3",
        "--eval-limit",
        "16",
        *common,
    ]
    return {"oaif": oaif, "dpo": dpo}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    draw = random.Random(given.seed)
    found: dict[str, Any] = {"machine": machine(), "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        commands = prepare(root)
        undisturbed = {}
        for method, times in (("oaif", 20), ("dpo", 10)):
            whole = undisturbed[method] = Trial(root, f"{method}-whole", commands[method])
            ended = whole.start()
            assert ended.returncode == 0, ended.stderr
            seconds = json.loads((whole.directory / "summary.json").read_text())["seconds"]
            print(f"{method}: undisturbed in {seconds} s", flush=True)
            trial = Trial(root, f"{method}-killed", commands[method])
            found[method] = kill_often(trial, whole, times, draw)
        print("other failures", flush=True)
        misfortunes(root, commands["oaif"], undisturbed["oaif"])
        found["full_disk"] = full_disk(root, commands["oaif"], undisturbed["oaif"])
    found["failed"] = FAILED
    found["seconds"] = round(time.perf_counter() - began)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{len(FAILED)} failed, {found['seconds']} s, {given.output}")
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(child(sys.argv[2:]))
    main()
