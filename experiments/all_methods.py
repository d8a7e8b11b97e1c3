"""Every method on one task at one cost: SmolLM2-135M-Instruct, everyday prompts, VADER's sentiment as gold.

Each method gets the same number of sampled tokens (what its data were sampled with included) and the same
number of optimizer steps. Where it has preference pairs or demonstrations from people, gold stands in for
them. Where it asks a reward, that is gold itself, or with `--reward model` a reward model that was
trained on pairs labelled by gold; but what stands for a judge or a label (oaif, click) always is gold.
What that reward model says of a run's evaluation texts is put into the rows by `--rescore`.
Every run is a process of its own; its row is appended to the output as soon as it is there, and rows that
are there are not made again.

    python experiments/all_methods.py --work runs/all --jobs 2
    python experiments/all_methods.py --work runs/all --rescore

What becomes of the rows in the documents is for `comparison.py`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import palate
from machine import machine
from palate.annotate import RewardModel
from palate.config import MethodConfig, Sampling
from palate.loops.report import fresh_logps
from palate.model import Snapshot
from palate.quiet import quiet_libraries
from palate.types import Completion, Group, Prompt

RESULTS = Path(__file__).parent / "results" / "all_methods.jsonl"
REWARD_MODEL = RESULTS.with_name("all_methods_reward_model.json")
"""What is known of the reward model, beside the rows."""
STEPS, BATCH, NEW_TOKENS = 10, 16, 40
COMPLETIONS = STEPS * BATCH * 4
"""Sampled by every method, of at most NEW_TOKENS tokens each."""
SAMPLING = Sampling(max_new_tokens=NEW_TOKENS, temperature=1.0, top_k=0, top_p=1.0, sampling_rows=64)
SAMPLED = SAMPLING.model_dump(exclude={"compile"})
POLICY = {"model": "smollm2", "lora_rank": 16, "lr": 5e-4}
COMMON = {**POLICY, "batch_size": BATCH, "fresh_prompts": 0}  # measured on the evaluation's texts
FRESH = {**SAMPLED, "data": "everyday", "reward": "GOLD"}
ASKED = {**FRESH, "reward": "REWARD"}

# What each method does with its share. `given` is what was sampled for it beforehand.
ARMS: dict[str, dict[str, Any]] = {
    "sft": {"data": "DEMONSTRATIONS", "limit": 40, "steps": STEPS},
    "dpo": {"data": "PAIRS", "limit": 160, "steps": STEPS},
    "ipo": {"data": "PAIRS", "limit": 160, "steps": STEPS},
    "oaif": {**FRESH, "n": 4, "steps": STEPS},
    "rft": {**ASKED, "n": 8, "prompts_per_round": 40, "rounds": 2, "steps": STEPS // 2},
    "rso": {**ASKED, "limit": 40, "n": 16, "keep": 8, "steps": STEPS},
    "slic-hf": {**ASKED, "limit": 160, "n": 4, "steps": STEPS},
    "rrhf": {**ASKED, "limit": 160, "n": 4, "steps": STEPS},
    "click": {**FRESH, "limit": 160, "n": 4, "steps": STEPS},
    "spin": {
        **SAMPLED, "data": "DEMONSTRATIONS", "limit": 35, "rounds": 2, "steps": STEPS // 2
    },
    "rest": {
        **ASKED, "limit": 80, "n": 8, "rounds": 1, "steps": STEPS // 2,
        "threshold_by": "quantile", "thresholds": [0.5, 0.8],
    },
    "iterative-dpo": {**ASKED, "n": 4, "prompts_per_round": 80, "rounds": 2, "steps": STEPS // 2},
    "pairwise-cringe": {**ASKED, "n": 4, "prompts_per_round": 80, "rounds": 2, "steps": STEPS // 2},
}  # fmt: skip
SEEN = 240
"""Of the training prompts, those whose samples are data; the others' are held out."""
EVALUATION_SEED = 1000
"""Of the held-out samples of all rows: every method and seed is compared with the same texts of the base."""
GIVEN = {"sft": 40 * 16, "spin": 35 * 16, "dpo": COMPLETIONS, "ipo": COMPLETIONS}
"""Completions that were sampled to make a method's data."""


# ---- What is made once -----------------------------------------------------------------------------


def prepare(work: Path, reward: str) -> dict[str, str]:
    """Pairs, demonstrations and the reward that is asked, in `work`; what is there is not made again."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "demonstrations.jsonl").exists():
        _write_data(work)
    if reward == "model":
        _train_reward_model(work)
    return {
        "GOLD": "sentiment",
        "REWARD": "sentiment" if reward == "gold" else f"model:{work / 'reward-model'}",
        "PAIRS": str(work / "pairs.jsonl"),
        "DEMONSTRATIONS": str(work / "demonstrations.jsonl"),
    }


def _write_data(work: Path) -> None:
    gold, base, train = palate.annotator(["sentiment"]), _base(), palate.read_prompts("everyday")
    pool = gold(base.sample(train[:SEEN], 4, SAMPLING, seed=1))
    other = gold(base.sample(train[SEEN:], 4, SAMPLING, seed=2))
    best_of = gold(base.sample(train[:60], 16, SAMPLING, seed=3))
    _write_pairs(work / "pairs.jsonl", pool, palate.best_vs_worst)
    _write_pairs(work / "held-out-pairs.jsonl", other, palate.best_vs_worst)
    palate.write_rows(work / "demonstrations.jsonl", [_best(group) for group in best_of])


def _train_reward_model(work: Path) -> None:
    """On gold-labelled pairs of the base's samples, one pass; what is there is not made again."""
    data = work / "reward-pairs.jsonl"
    if not data.exists():
        train = palate.read_prompts("everyday")[:SEEN]
        candidates = _base().sample(train, 16, SAMPLING, seed=4)
        _write_pairs(data, palate.annotator(["sentiment"])(candidates), outside_in)
    if not (work / "reward-model" / "summary.json").exists():
        cls = palate.METHODS["reward-model"].config
        cfg = cls.model_validate(
            {
                **COMMON, "lr": 3e-4, "schedule": "linear", "data": str(data),
                "eval_data": str(work / "held-out-pairs.jsonl"), "output": work / "reward-model",
            }
        )  # fmt: skip
        palate.train("reward-model", cfg, display=palate.Display())


def _base() -> Snapshot:
    return palate.Policy.load(MethodConfig(**POLICY, data="everyday"), total_steps=1).snapshot()


def _write_pairs(file: Path, groups: Sequence[Group], select: Callable[[Group], palate.Selected]) -> None:
    pairs, _ = palate.select_pairs(groups, select)
    palate.write_rows(
        file,
        (
            {
                "prompt": p.prompt.content,
                "chosen": p.chosen.text,
                "rejected": p.rejected.text,
                "chosen_finish": p.chosen.finish,
                "rejected_finish": p.rejected.finish,
            }
            for p in pairs
        ),
    )


def outside_in(group: Group) -> palate.Selected:
    """Best and worst, second best and second worst, and so on: every completion in one pair, ties in none."""
    rewards = [reward or 0.0 for reward in group.rewards or ()]
    ranked = sorted(zip(rewards, group.completions, strict=True), key=lambda pair: -pair[0])
    halves = zip(ranked[: len(ranked) // 2], ranked[::-1], strict=False)
    pairs = [palate.Pair(group.prompt, best, worst) for (high, best), (low, worst) in halves if high > low]
    return palate.Selected(tuple(pairs), {})


def _best(group: Group) -> dict[str, Any]:
    best = palate.top_k(group, 1).completions[0]
    return {"prompt": group.prompt.content, "completion": best.text, "finish": best.finish}


# ---- One run ---------------------------------------------------------------------------------------


def run(method: str, seed: int, work: Path, reward: str) -> dict[str, Any]:
    """Train, then compare with the base by gold."""
    made = prepare(work, reward)
    arm = {
        name: made.get(value, value) if isinstance(value, str) else value
        for name, value in ARMS[method].items()
    }
    if method == "rso":
        arm["accept"] = arm.pop("keep")  # the name that the option had when the first rows were made
    output = work / f"{method}-{asks(method, reward)}-{seed}"
    cfg = palate.METHODS[method].config.model_validate({**COMMON, **arm, "seed": seed, "output": output})
    began = time.process_time()
    cut_off = output.exists()  # then an earlier process has done part of the work
    outcome = palate.train(method, cfg, display=palate.Display())
    cpu_seconds = None if cut_off else round(time.process_time() - began, 1)
    peak = None if cut_off else round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
    seconds = outcome.summary["seconds"]
    metrics = lines_of(output / "metrics.jsonl")
    journal = palate.Journal(output / "journal.db")
    rows = list(journal.table())
    journal.close()

    base: Any = Remembered(palate.Policy.load(cfg, total_steps=1).snapshot(), work)
    gold = palate.annotator(["sentiment"])
    held_out = palate.read_prompts("everyday", split="test")
    found = palate.compare(base, outcome.policy.snapshot(), held_out, gold, SAMPLING, seed=EVALUATION_SEED)
    palate.write_rows(work / f"{output.name}-texts.jsonl", found.samples())
    last = {name: value for row in metrics for name, value in row.items()}
    return {
        "method": method,
        "seed": seed,
        "reward": asks(method, reward),
        **{name: round(value, 4) for name, value in found.summary().items()},
        "sampled_completions": len(rows) + GIVEN.get(method, 0),
        "sampled_tokens": sum(row["tokens"] for row in rows) + GIVEN.get(method, 0) * NEW_TOKENS,
        "sampled_for_reward_model": SEEN * 16 if asks(method, reward) == "model" else 0,
        "annotated": sum(row["reward"] is not None for row in rows) + GIVEN.get(method, 0),
        "optimizer_steps": outcome.learner.version,
        "logps_training": last.get("logps/training"),
        "logps_sampled": last.get("logps/fresh"),
        "logps_fresh": fresh_logps(found.after)["logps/fresh"],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "threads": torch.get_num_threads(),
        "peak_memory_gb": peak,
        "arm": ARMS[method],
        "machine": machine(),
    }


class Remembered:
    """The base, whose evaluation texts serve all runs: what it has sampled is in a file."""

    def __init__(self, snapshot: Snapshot, work: Path) -> None:
        self.logps, self._snapshot, self._work = snapshot.logps, snapshot, work

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, *, seed: int) -> list[Group]:
        """As `Snapshot.sample`."""
        file = self._work / f"base-{seed}.jsonl"
        if file.exists():
            return [
                Group(prompt, (Completion(row["text"], tuple(row["token_ids"]), row["finish"]),))
                for prompt, row in zip(prompts, lines_of(file), strict=True)
            ]
        groups = self._snapshot.sample(prompts, n, sampling, seed=seed)
        palate.write_rows(
            file,
            (
                {"text": c.text, "token_ids": c.token_ids, "finish": c.finish}
                for group in groups
                for c in group.completions
            ),
        )
        return groups


def asks(method: str, reward: str) -> str:
    """Whose rewards a method learns from: `gold`, `model`, or `data`, where it asks none."""
    return {"REWARD": reward, "GOLD": "gold"}.get(ARMS[method].get("reward", ""), "data")


def rescore(work: Path, output: Path) -> None:
    """Write into the rows that lack it what the reward model says of the texts that a run was evaluated by.

    `model_gain` is the mean difference of its rewards, after minus before, in log-odds; `model_win_rate` how
    often it prefers the text of the trained policy. What is known of the reward model goes beside the rows.
    """
    _train_reward_model(work)
    texts = {name_of(row): _texts_of(work, row) for row in rows_of(output) if "model_gain" not in row}
    # A prompt's texts side by side, so that the prompt is computed once for all of them.
    asked = sorted({(t["prompt"], t[when]) for every in texts.values() for t in every for when in WHEN})
    score = RewardModel.load(str(work / "reward-model"))
    given = score([Prompt(prompt) for prompt, _ in asked], [Completion(text, (0,)) for _, text in asked])
    rewards = dict(zip(asked, given, strict=True))
    rows = rows_of(output)  # runs that have ended meanwhile
    for row in rows:
        every = texts.get(name_of(row), [])
        scored = [[rewards[t["prompt"], t[when]] or 0.0 for when in WHEN] for t in every]
        if scored:
            gains = [after - before for before, after in scored]
            row["model_gain"] = round(sum(gains) / len(gains), 3)
            row["model_win_rate"] = round(sum((g > 0) + (g == 0) / 2 for g in gains) / len(gains), 3)
    aside = output.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    aside.replace(output)
    summary = json.loads((work / "reward-model" / "summary.json").read_text())
    del summary["checkpoint"]
    known = json.dumps({**summary, "machine": machine()}, indent=2)
    output.with_name(REWARD_MODEL.name).write_text(known + "\n", encoding="utf-8")


WHEN = ("before", "after")


def name_of(row: dict[str, Any]) -> str:
    """Of a row's run."""
    return f"{row['method']}-{row['reward']}-{row['seed']}"


def _texts_of(work: Path, row: dict[str, Any]) -> list[dict[str, Any]]:
    return lines_of(work / f"{name_of(row)}-texts.jsonl")


def lines_of(file: Path) -> list[dict[str, Any]]:
    """What a file of JSON lines has. Line by line: `splitlines` also cuts at U+2028, which texts have."""
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- All of them -----------------------------------------------------------------------------------


def rows_of(output: Path) -> list[dict[str, Any]]:
    """What is there. Ends where a row is of other arms than these, with which it is not to be compared."""
    rows = lines_of(output)
    for row in rows:
        if row["arm"] != json.loads(json.dumps(ARMS[row["method"]])):
            raise SystemExit(
                f"{output}: the row of {row['method']}, seed {row['seed']}, was made with other numbers than "
                "this script's; take another --output and --work"
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path("runs/all"))
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--reward", choices=("gold", "model"), default="gold", help="where one is asked")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--rescore", action="store_true", help="ask the reward model of every row, and end")
    parser.add_argument("--one", action="store_true", help="one run in this process; used by the others")
    given = parser.parse_args()
    quiet_libraries()
    if given.rescore:
        rescore(given.work, given.output)
        return
    if given.one:
        row = run(given.methods[0], given.seeds[0], given.work, given.reward)
        with given.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return
    prepare(given.work, given.reward)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.touch()
    there = {(row["seed"], row["method"], row["reward"]) for row in rows_of(given.output)}
    every = itertools.product(given.seeds, given.methods)
    wanted = [(seed, name) for seed, name in every if (seed, name, asks(name, given.reward)) not in there]
    with ThreadPoolExecutor(given.jobs) as pool:
        for told in pool.map(lambda one: in_a_process(given, *one), wanted):
            print(told, flush=True)


def in_a_process(given: argparse.Namespace, seed: int, method: str) -> str:
    """One run, with its share of the cores; returns what became of it."""
    began = time.perf_counter()
    ended = subprocess.run(
        [
            *(sys.executable, __file__, "--one", "--methods", method, "--seeds", str(seed)),
            *("--work", str(given.work), "--output", str(given.output), "--reward", given.reward),
        ],
        env={**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // given.jobs))},
        check=False,
    )
    told = "done" if ended.returncode == 0 else f"failed with {ended.returncode}"
    return f"{method} seed {seed}: {told} in {time.perf_counter() - began:.0f} s"


if __name__ == "__main__":
    main()
