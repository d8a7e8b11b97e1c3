"""Kill one of two processes of a run many times, and check that the other ends and that no work is lost.

An `oaif` run with a copy of the weights in each process, one with sharded weights, and one with a sharded
base and an adapter lose process 0 or process 1 (SIGKILL) at random moments: while they sample, annotate,
learn, write their part of a checkpoint or the checkpoint. The same command resumes, and the result is
compared with an undisturbed run of two processes, of which a second start gives the same bits. Then Ctrl-C
reaches one process only, and runs continue in one process instead of two, and in two instead of one.

    python experiments/soak_distributed.py --output experiments/results/soak_distributed.json

`make soak-distributed` does the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

import soak
from machine import machine

LIMIT = 60
"""Seconds within which the other process must end; its longest piece of work is far shorter."""

LEADER = ("sample", "annotate", "learn", "checkpoint", "journal", "resume")
OTHERS = ("sample", "learn")
"""Places at which process 0, and the other one, are killed."""

ARMS = {
    "copies": ["--no-lora", "--sharding", "none"],
    "sharded": ["--no-lora", "--sharding", "full"],
    "sharded with LoRA": ["--lora-rank", "4", "--sharding", "full"],
}

REWARD = """
import os

def vowels(completions, completion_ids):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    with open(os.environ["SOAK_ASKED"], "a") as log:
        log.write("".join(f"{os.environ['RANK']}\\n" for _ in texts))
    return [sum(t.count(v) for v in "aeiou") + len(ids) / 100 for t, ids in zip(texts, completion_ids)]
"""


class Pair(soak.Trial):
    """A run of two processes in its own directory."""

    def __init__(self, root: Path, name: str, arguments: list[str]) -> None:
        super().__init__(root, name, arguments)
        self.asked = root / f"{name}.asked"
        self.asked.touch()

    def begin(self, victim: int | None = None, kill: str = "", size: int = 2) -> list[subprocess.Popen[str]]:
        """Start the processes; the victim is killed as `soak.Trial.start` says."""
        self.store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        running = []
        for rank in range(size):
            given = {
                "SOAK_LOG": self.log if rank == 0 else self.root / f"{self.name}.{rank}.log",
                "SOAK_PLACE": self.root / f"{self.name}.{rank}.place",
                "SOAK_KILL": kill if rank == victim else "",
                "SOAK_ASKED": self.asked,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": size,
                "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
                "OMP_NUM_THREADS": 1,
            }
            command = [sys.executable, soak.__file__, "--child", *self.arguments]
            running.append(
                subprocess.Popen(
                    [*command, "--output", str(self.directory)],
                    env={**os.environ, **{k: str(v) for k, v in given.items()}},
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return running

    def end(self, running: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
        """Wait for the processes; return exit code and error output of each."""
        ended = []
        for process in running:
            try:
                _, said = process.communicate(timeout=10 * LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                ended.append((-1, "it did not end"))
            else:
                ended.append((process.returncode, said))
        return ended

    def whole(self, size: int = 2) -> list[tuple[int, str]]:
        """Run to the end."""
        return self.end(self.begin(size=size))


def kill_often(
    trial: Pair, whole: Pair, times: int, draw: random.Random, more: tuple[str, ...]
) -> dict[str, Any]:
    """Kill a process and resume, `times` times; then compare the end with that of `whole`.

    `more` are places where both are killed beside the usual ones.
    """
    waits, places = [], []
    kills = repeated = 0
    for i in range(times):
        victim = i % 2
        place = draw.choice((*(LEADER if victim == 0 else OTHERS), *more))
        nth = 1 if place == "resume" else draw.randint(1, 4)
        before, noted = trial.committed(), len(trial.lines("sample"))
        running = trial.begin(victim, f"{place}:{nth}:{draw.uniform(0, 0.03)}")
        running[victim].wait(timeout=10 * LIMIT)
        died = time.perf_counter()
        ended = trial.end(running)
        if ended[victim][0] != -signal.SIGKILL:  # the run finished first
            break
        kills += 1
        waits.append(time.perf_counter() - died)
        places.append(f"{victim} {place}")
        code, said = ended[1 - victim]
        sentence = f"process {victim} of 2 ended without an error message"
        soak.check(
            f"{trial.name}: kill {kills}, process {victim} at {place}: the other ends in {waits[-1]:.1f} s",
            code == 2 and waits[-1] < LIMIT and said.count(sentence) == 1,
        )
        again = [line.split()[1] for line in trial.lines("sample")[noted:]]
        repeated += sum(key in before for key in again)
    soak.check(f"{trial.name}: ended well", all(code == 0 for code, _ in trial.whole()))
    same = trial.weights() == whole.weights()
    soak.check(f"{trial.name}: weights and optimizer are bitwise those of the undisturbed run", same)
    soak.check(f"{trial.name}: no committed chunk was computed again ({repeated})", repeated == 0)
    asked = trial.asked.read_text().split()
    soak.check(f"{trial.name}: only process 0 asked for rewards", set(asked) == {"0"})
    extra = len(asked) - len(whole.asked.read_text().split())
    soak.check(f"{trial.name}: {extra} rewards asked again, at most 32 a kill", extra <= 32 * kills)
    return {
        "kills": kills,
        "killed_at": places,
        "bitwise": same,
        "committed_chunks_repeated": repeated,
        "rewards_asked_again": extra,
        "seconds_until_the_other_ended": [round(wait, 1) for wait in waits],
    }


def interrupted(trial: Pair, whole: Pair) -> None:
    """Send Ctrl-C to process 1 only, then resume."""
    running = trial.begin()
    until = time.monotonic() + 5 * LIMIT
    while len(trial.lines("step")) < 3 and time.monotonic() < until:
        time.sleep(0.1)
    running[1].send_signal(signal.SIGINT)
    ended = trial.end(running)
    soak.check(f"{trial.name}: both end after Ctrl-C on one", [code for code, _ in ended] == [130, 130])
    soak.check(f"{trial.name}: and say how to resume", "run the same command again to resume" in ended[0][1])
    soak.check(f"{trial.name}: resumes", all(code == 0 for code, _ in trial.whole()))
    soak.check(f"{trial.name}: and ends in the same weights", trial.weights() == whole.weights())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=8, help="of each kind of run")
    given = parser.parse_args()
    began = time.perf_counter()
    draw = random.Random(given.seed)
    figures: dict[str, Any] = {"machine": machine(), "seed": given.seed}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        command = soak.prepare(root, steps=10)["oaif"]
        (root / "reward.py").write_text(REWARD)
        command[command.index("--threads") : command.index("--threads") + 2] = []
        command += ["--eval-limit", "4"]
        command.remove("--no-lora")
        for arm, options in ARMS.items():
            own, name = [*command, *options], arm.replace(" ", "-")
            whole, second = (Pair(root, f"{name}-{which}", own) for which in ("whole", "second"))
            for code, said in (*whole.whole(), *second.whole()):
                assert code == 0, said
            soak.check(f"{name}: two starts give the same bits", whole.weights() == second.weights())
            trial, more = Pair(root, f"{name}-killed", own), () if arm == "copies" else ("part",)
            figures[arm] = kill_often(trial, whole, given.kills, draw, more)
            interrupted(Pair(root, f"{name}-interrupted", own), whole)
            for before, after in ((2, 1), (1, 2)):
                again = Pair(root, f"{name}-{before}-{after}", own if before > 1 else [*own[:-1], "none"])
                again.end(again.begin(before - 1, "learn:5:0", size=before))
                again.arguments = own if after > 1 else [*own[:-1], "none"]
                well = all(code == 0 for code, _ in again.whole(size=after))
                soak.check(f"{name}: a run of {before} resumes in {after}", well)
    figures["failed"] = soak.FAILED
    figures["seconds"] = round(time.perf_counter() - began)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(figures, indent=2) + "\n")
    print(f"{len(soak.FAILED)} failed, {figures['seconds']} s, {given.output}")
    sys.exit(bool(soak.FAILED))


if __name__ == "__main__":
    main()
