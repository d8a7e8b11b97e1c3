"""Self-rewarding on the embedded model and the demo's task, cheerful answers.

The base model answers prompts of `everyday`, VADER's sentiment ranks the answers, and `palate make eft`
writes gradings from these ranks (`--eft-writer gold`), because a model of this size cannot write its own.
`palate run sft` teaches them, and then some of them together with the model's own answers (IFT), without
which M1 would answer everything with a grading. All seeds share M1. The judge's question is plain text that
ends in "The mood of this text is:" (cheerful.jinja), outside the turns of a chat (cheerful-chat.jinja), and
the gradings begin with a word for a mood (cheerful.txt): asked in this way, a model of this size knows most
about moods.
Then come the rounds of M2 and M3. Two other arms start from the base model without the gradings, with
themselves and with VADER as the judge.

    python experiments/self_rewarding.py --work runs/self-rewarding        # all arms; resumes
    python experiments/self_rewarding.py --work runs/self-rewarding --arms self --seeds 0
    python experiments/self_rewarding.py --write                           # the results into the document
    python experiments/self_rewarding.py --check

Each finished arm and seed is a row of experiments/results/self_rewarding.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import palate
from machine import machine
from marks import missing, write
from palate.annotate.rules import sentiment
from palate.cli import main as palate_main
from palate.config import ModelConfig, Sampling
from palate.data import read_prompts, write_rows
from palate.errors import RunError
from palate.journal import Journal
from palate.model import Snapshot, load_model
from palate.quiet import quiet_libraries
from palate.types import Group

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "self_rewarding.jsonl"
PAGE = HERE.parent / "docs" / "methods" / "self-rewarding.md"
TEMPLATE, TURNS, MOODS = (HERE / f"cheerful{end}" for end in (".jinja", "-chat.jinja", ".txt"))

TAUGHT, MEASURED = 300, 30
"""Prompts of `everyday` whose ranked answers become gradings, and those after them that measure the judge;
the rounds take the rest."""
ANSWERS, HELD_OUT, OWN, TOKENS = 8, 4, 2, 40
"""Answers per prompt for the gradings, the measurements, and M1 to imitate; the most tokens of an answer."""
AGAIN = 1200
"""Gradings that M1 learns once more, together with the answers."""

ARMS: Mapping[str, Sequence[int]] = {"self": (0, 1, 2), "no eft": (0,), "gold judge": (0,)}
"""The seeds of each arm."""

GRADE = {
    "judge_template": str(TEMPLATE), "judge_reasoning": 16, "judge_temperature": 0.7, "judge_samples": 24,
}  # fmt: skip
RUN = {
    "chat_template": str(TURNS),
    "batch_size": 8,
    "epochs": 2,
    "lr": 3e-4,
    "schedule": "linear",
    "prompts_per_round": 40,
    "max_new_tokens": TOKENS,
    "temperature": 1.0,
    "top_p": 1.0,
    "eval_limit": 50,
    "eval_reward": "sentiment",
    "dtype": "bfloat16",
}
LESSONS: dict[str, Any] = {
    "batch_size": 16, "epochs": 3, "lr": 4e-4, "adam_beta2": 0.95, "warmup_steps": 10, "schedule": "linear",
    "lora_rank": 16, "dtype": "bfloat16", "chat_template": str(TURNS),
}  # fmt: skip
BOTH: dict[str, Any] = {"epochs": 1, "lr": 1e-4}
"""Settings of `sft` for the gradings, and what differs for gradings and answers together."""


def prepare(work: Path) -> Path:
    """Answer prompts with the base model, rank the answers by VADER, make the gradings; return M1."""
    taught, measured, answers, eft, both = (
        work / f"{name}.jsonl" for name in ("taught", "measured", "answers", "eft", "both")
    )
    graded, m1 = work / "graded", work / "m1"
    prompts = read_prompts("everyday")
    if not answers.exists():
        model = load_model(ModelConfig(lora=False, dtype="bfloat16"), trainable=False)
        with closing(Journal(work / "ranked.db")) as journal:
            base = Snapshot(0, lambda: nullcontext(model), micro_batch_tokens=2048, memory=lambda: journal)
            sampling = Sampling(max_new_tokens=TOKENS)
            write_rows(taught, ranked(base.sample(prompts[:TAUGHT], ANSWERS, sampling, seed=11)))
            others = prompts[TAUGHT : TAUGHT + MEASURED]
            write_rows(measured, ranked(base.sample(others, HELD_OUT, sampling, seed=11)))
            write_rows(answers, demonstrations(base.sample(prompts[:TAUGHT], OWN, sampling, seed=12)))
    if not eft.exists():
        command = ["make", "eft", "--data", str(taught), "--held-out", "0"]
        command += ["--judge-template", str(TEMPLATE), "--justifications", str(MOODS), "--output", str(eft)]
        if palate_main(command):
            raise SystemExit("the gradings could not be made")
    rest = prompts[TAUGHT + MEASURED :]
    write_rows(work / "prompts.jsonl", [{"prompt": prompt.text} for prompt in rest])
    if not (graded / "summary.json").exists():
        palate.train("sft", output=graded, data=str(eft), **LESSONS)
    if not (m1 / "summary.json").exists():
        lines = eft.read_text("utf-8").splitlines()[:AGAIN] + answers.read_text("utf-8").splitlines()
        both.write_text("\n".join(lines) + "\n", "utf-8")
        palate.train("sft", output=m1, data=str(both), model=str(graded), **LESSONS | BOTH)
    return m1


def demonstrations(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row for each completion; those that were truncated get no end token."""
    return [
        {"prompt": group.prompt.text, "completion": c.text, "finish": c.finish}
        for group in groups
        for c in group.completions
    ]


def ranked(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return a row of ranked answers for each prompt; its scores are VADER's."""
    score = sentiment().score
    return [
        {
            "prompt": group.prompt.text,
            "completions": [c.text for c in group.completions],
            "scores": [score(c.text) for c in group.completions],
        }
        for group in groups
    ]


def run(arm: str, seed: int, work: Path, m1: Path) -> dict[str, Any]:
    """Run an arm, and return its row: the measurements of each policy, or the error that ended it."""
    options: dict[str, Any] = {**RUN, "data": str(work / "prompts.jsonl"), "eval_data": "everyday"}
    if arm == "gold judge":
        options["reward"] = "sentiment"
    else:
        options |= GRADE | {"judge_data": str(work / "measured.jsonl"), "judge_gap": 0.2}
    if arm == "self":
        options |= {"model": str(m1)}
    directory = work / f"{arm.replace(' ', '-')}-{seed}"
    row: dict[str, Any] = {"arm": arm, "seed": seed}
    try:
        outcome = palate.train("self-rewarding", output=directory, seed=seed, **options)
        row["summary"] = {k: v for k, v in outcome.summary.items() if k != "checkpoint"}
    except RunError as error:
        row["error"] = str(error)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    row["judge"] = [_of(line, "eval_judge/") for line in lines if "eval_judge/pairs" in line]
    row["contests"] = [_of(line, "eval_round_") for line in lines if "eval_round_win_rate" in line]
    row["rounds"] = list({line["round"]: _of_round(line) for line in lines if line.get("round")}.values())
    return row


def _of(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): v for name, v in line.items() if name.startswith(prefix)}


def _of_round(line: Mapping[str, Any]) -> dict[str, float]:
    names = ("round", "objective/scores", "pairs/kept", "pairs/dropped", "completions/mean_length")
    return {name: line[name] for name in names if name in line}


# -- The document ------------------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Return the last row of each arm and seed."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return list({(row["arm"], row["seed"]): row for row in rows}.values())


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the results as Markdown."""
    if not rows:
        return ["There are no results yet."]
    lines = [
        *wrapped(
            "Pairwise accuracy is that of the policy as a judge, on held-out answers whose VADER scores "
            "differ by at least 0.2, with its 95 % interval; a tie counts one half, as does a pair "
            "with an answer that has no clear score."
        ),
        "",
        "| arm | seed | judge | pairwise | ties | unclear | exact | Spearman | Kendall | 5-best | mean |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = 1 if row["arm"] == "self" else 0
        names = [f"M{i}" for i in (start, 2, 3)][: len(row["judge"])]
        for name, judge in zip(names, row["judge"], strict=True):
            rate = "none"
            if "pairwise" in judge:
                rate = f"{judge['pairwise']:.2f} [{judge['pairwise_low']:.2f}, {judge['pairwise_high']:.2f}]"
            keys = ("ties", "unclear", "exact", "spearman", "kendall", "best", "mean")
            cells = [f"{judge[key]:.2f}" if key in judge else "none" for key in keys]
            lines.append(f"| {' | '.join([row['arm'], str(row['seed']), name, rate, *cells])} |")
    lines += [
        "",
        *wrapped(
            "The contests are on held-out prompts: mean VADER score, share of prompts on which a policy "
            "beats the one before it, and tokens per answer. `own scores` is the mean that the judge "
            "gave in the round."
        ),
        "",
        "| arm | seed | contest | reward | win rate | KL (nats) | tokens | pairs | own scores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for i, contest in enumerate(row["contests"]):
            own = row["rounds"][i] if i < len(row["rounds"]) else {}
            rate = (
                f"{contest['win_rate']:.2f} [{contest['win_rate_low']:.2f}, {contest['win_rate_high']:.2f}]"
            )
            first = 1 if row["arm"] == "self" else 0
            over = f"M{i + 2} over M{i + 1 if i or first else 0}"
            cells = [f"{contest['reward']:.2f}", rate, f"{contest['kl']:.1f}", f"{contest['length']:.0f}"]
            cells += [str(own.get("pairs/kept", "")), f"{own.get('objective/scores', float('nan')):.2f}"]
            lines.append(f"| {' | '.join([row['arm'], str(row['seed']), over, *cells])} |")
    for row in rows:
        if "summary" in row:
            done = row["summary"]
            rate = f"{done['win_rate']:.2f} [{done['win_rate_low']:.2f}, {done['win_rate_high']:.2f}]"
            start = "M1" if row["arm"] == "self" else "M0"
            said = (
                f"{done['reward_before']:.2f} → {done['reward_after']:.2f} in mean VADER score, win rate of "
                f"M3 over {start} {rate}, {done['length_before']:.0f} → {done['length_after']:.0f} tokens, "
                f"{done['kl']:.1f} nats from {start}."
            )
        else:
            said = f"ended with this message: {row['error']}"
        lines += ["", *wrapped(f"`{row['arm']}`, seed {row['seed']}: {said}")]
    if rows:
        made = rows[-1]["machine"]
        lines += ["", f"{made['processor']}, one thread, bfloat16, {made['date']}."]
    return lines


def wrapped(text: str) -> list[str]:
    """Return the lines of a paragraph."""
    return textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/self-rewarding"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each arm")
    parser.add_argument("--write", action="store_true", help="write the results into the document")
    parser.add_argument("--check", action="store_true", help="exit with an error if the document differs")
    given = parser.parse_args()
    parts = {"results": tables(rows_of(given.output))}
    if given.check:
        sys.exit(1 if missing(PAGE, parts) else 0)
    if given.write:
        write(PAGE, parts)
        return
    quiet_libraries()
    given.work.mkdir(parents=True, exist_ok=True)
    m1 = prepare(given.work)
    done = {(row["arm"], row["seed"]) for row in rows_of(given.output)}
    for arm in given.arms:
        for seed in given.seeds or ARMS[arm]:
            if (arm, seed) in done:
                continue
            row = run(arm, seed, given.work, m1) | {"machine": machine()}
            with given.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
