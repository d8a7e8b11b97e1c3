"""Criteria decide: the same oaif run with "cheerful" and with "brief" moves the model in two directions.

SmolLM2-135M-Instruct, LoRA, everyday prompts, two completions each. Only `--criteria` differs between the two
runs; the policy is the only model that is trained. The judge is scripted: a server on this machine that
speaks the OpenAI protocol, reads the criteria from the question, and answers with label probabilities, from
VADER's sentiment if they ask for cheerful answers and from the number of words if they ask for brief ones. It
stands for a model that understands them. Rows that exist are not made again; an interrupted run starts over,
because the server then has another address, which is part of a judge's name.

    python experiments/criteria.py --work runs/criteria
    python experiments/criteria.py --write      # into docs/methods/oaif.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import palate
from machine import machine
from marks import missing, write
from palate.annotate import sentiment
from palate.quiet import quiet_libraries
from palate.testing import FaultyServer, judge_reply
from palate.types import Completion, Prompt

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods" / "oaif.md"
RESULTS = Path(__file__).parent / "results" / "criteria.jsonl"
CRITERIA: Mapping[str, str] = {
    "cheerful": "Prefer the more cheerful answer.",
    "brief": "Prefer the more brief answer.",
}
COMMON = {
    "model": "smollm2", "dtype": "bfloat16", "lora_rank": 16, "lr": 6e-4, "schedule": "linear",
    "data": "everyday", "batch_size": 16, "steps": 20, "n": 2, "temperature": 1.0, "max_new_tokens": 40,
    "eval_data": "everyday", "eval_limit": 40,
    "eval_reward": "sentiment", "fresh_prompts": 0, "price_in": 0.0, "price_out": 0.0,
}  # fmt: skip
SAMPLES = 3
"""Held-out prompts whose answers the row keeps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/criteria"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true", help="put the results into docs/methods/oaif.md")
    parser.add_argument("--check", action="store_true", help="say whether the document is as the rows say")
    args = parser.parse_args()
    parts = {"criteria": paragraph(rows())}
    if args.check:
        sys.exit(f"not what experiments/criteria.py writes: {PAGE}" if missing(PAGE, parts) else 0)
    if args.write:
        write(PAGE, parts)
        return
    quiet_libraries()
    for seed in args.seeds:
        for name in CRITERIA:
            if not any((row["criteria"], row["seed"]) == (name, seed) for row in rows()):
                made = run(name, seed, args.work)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(made) + "\n")


def rows() -> list[dict[str, Any]]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def run(name: str, seed: int, work: Path) -> dict[str, Any]:
    """One run and its row."""
    output = work / f"{name}-{seed}"
    os.environ["CRITERIA_KEY"] = "none"
    with FaultyServer(lambda body, number: judge_reply(body, preference(body))) as server:
        outcome = palate.train(
            "oaif", output=output, seed=seed, judge=f"server:scripted@{server.url}", criteria=CRITERIA[name],
            judge_key_env="CRITERIA_KEY", overwrite=True, **COMMON,
        )  # fmt: skip
    samples = outcome.samples
    cheer, words = sentiment(), lambda text: len(text.split())

    def mean(measure: Callable[[str], float], when: str) -> float:
        return round(statistics.mean(measure(row[when]) for row in samples), 3)

    def cheerful(text: str) -> float:
        return cheer([Prompt("")], [Completion(text, (0,))])[0] or 0.0

    return {
        "criteria": name,
        "seed": seed,
        **{f"cheer_{when}": mean(cheerful, when) for when in ("before", "after")},
        **{f"words_{when}": mean(words, when) for when in ("before", "after")},
        "ended_before": outcome.summary["eos_before"],
        "ended_after": outcome.summary["eos_after"],
        "prompts": len(samples),
        "kl": outcome.summary["kl"],
        "verdicts": outcome.summary["judge_verdicts"],
        "samples": [{key: row[key] for key in ("prompt", "before", "after")} for row in samples[:SAMPLES]],
        "seconds": outcome.summary["seconds"],
        "machine": machine(),
    }


def preference(body: Mapping[str, Any]) -> Callable[[str, str], float]:
    """P(first preferred) as the criteria in the question ask for."""
    question = body["messages"][0]["content"]
    cheerful = CRITERIA["cheerful"] in question
    assert cheerful != (CRITERIA["brief"] in question), "the question has one of the criteria"
    scorer = sentiment()

    def value(text: str) -> float:
        if not cheerful:
            return -len(text.split()) / 10
        return 2 * (scorer([Prompt("")], [Completion(text, (0,))])[0] or 0.0)

    def prefer(first: str, second: str) -> float:
        return min(0.99, max(0.01, 1 / (1 + math.exp(value(second) - value(first)))))

    return prefer


def paragraph(made: Sequence[dict[str, Any]]) -> list[str]:
    """The results in Markdown."""
    heads = ["`--criteria`", "seeds", "sentiment, before → after", "words, before → after",
             "ended by itself, before → after", "KL (nats)"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, text in CRITERIA.items():
        own = [row for row in made if row["criteria"] == name]
        if own:
            numbers = [key for key, value in own[0].items() if isinstance(value, int | float)]
            mean = {key: statistics.mean(row[key] for row in own) for key in numbers}
            lines.append(
                f'| "{text}" | {len(own)} | {mean["cheer_before"]:.2f} → {mean["cheer_after"]:.2f} | '
                f"{mean['words_before']:.1f} → {mean['words_after']:.1f} | "
                f"{mean['ended_before']:.0%} → {mean['ended_after']:.0%} | {mean['kl']:.1f} |"
            )
    for name in CRITERIA:
        own = [row for row in made if row["criteria"] == name]
        if own:
            sample = own[0]["samples"][0]
            one_line = {key: " ".join(str(value).split()) for key, value in sample.items()}
            lines += ["", f"A held-out prompt with {name!r}: *{one_line['prompt']}*", ""]
            lines += [f"- before: {one_line['before']}", f"- after: {one_line['after']}"]
    return lines


if __name__ == "__main__":
    main()
