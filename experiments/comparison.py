"""Write docs/comparison.md's table and a paragraph on each method page from the rows of `all_methods.py`.

python experiments/comparison.py          # print the table
python experiments/comparison.py --write  # put both into the documents, between their marks
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import palate
from all_methods import ARMS, BATCH, COMPLETIONS, NEW_TOKENS, POLICY, RESULTS, REWARD_MODEL, STEPS, rows_of
from marks import missing, write

ROOT = Path(__file__).resolve().parent.parent
Parts = dict[str, list[str]]


def main() -> None:
    """Print the table, or write everything, or with `--check` name what is not up to date."""
    rows = rows_of(RESULTS)
    if sys.argv[1:] == ["--write"]:
        for page, parts in documents(rows).items():
            write(page, parts)
    elif sys.argv[1:] == ["--check"]:
        old = [str(page) for page, parts in documents(rows).items() if missing(page, parts)]
        sys.exit(f"not what experiments/comparison.py writes: {', '.join(old)}" if old else 0)
    else:
        print("\n".join(table(rows)))


def documents(rows: Sequence[dict[str, Any]]) -> dict[Path, Parts]:
    """What each document is to have between its marks."""
    pages = {
        ROOT / "docs" / "methods" / f"{method}.md": {"comparison": paragraph(rows, method)}
        for method in ARMS
        if any(row["method"] == method for row in rows)
    }
    return {ROOT / "docs" / "comparison.md": {"comparison": table(rows)}, **pages}


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown: means over the seeds, with intervals that include the seeds (`interval_of`)."""
    scored = any("model_gain" in row for row in rows)
    heads = [
        "method", "learns from", "gold reward", "win rate over the base", "by seed",
        *(["reward model: gain (log-odds)"] if scored else []),
        "KL (nats)", "tokens each", "sampled tokens", "rewards asked for", "processor seconds", "memory (GB)",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, reward in itertools.product(ARMS, ("data", "gold", "model")):
        own = rows_of_one(rows, method, reward)
        if not own:
            continue
        mean = partial(mean_of, own)
        low, high = interval_of(own)
        cells = [
            f"`{method}`", reward, f"{mean('reward_before'):.2f} → {mean('reward_after'):.2f}",
            f"{mean('win_rate'):.2f} [{low:.2f}, {high:.2f}]",
            " ".join(f"{row['win_rate']:.2f}" for row in own),
            *([f"{mean('model_gain'):+.2f}"] if scored else []),
            f"{mean('kl'):.1f}", f"{mean('length_after'):.1f}", f"{mean('sampled_tokens'):,.0f}",
            f"{mean('annotated'):,.0f}", f"{mean('cpu_seconds'):.0f}", f"{mean('peak_memory_gb'):.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, *(["", *reward_model()] if scored else [])]


def interval_of(own: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The 95 % interval of a mean win rate, over other prompts and, with several seeds, over other seeds.

    The same prompts serve every seed, so more seeds do not make more prompts: their variance is that of one
    coin for each prompt. The variance of the mean over seeds is added to it. Wilson's interval follows for as
    many trials as have that variance together.
    """
    rates = [row["win_rate"] for row in own]
    mean = sum(rates) / len(rates)
    spread = mean * (1 - mean)
    of_prompts = spread / own[0]["compared"]
    of_seeds = statistics.variance(rates) / len(rates) if len(rates) > 1 else 0.0
    return palate.wilson(mean, spread / (of_prompts + of_seeds) if spread else own[0]["compared"])


def reward_model() -> list[str]:
    """What the column of the reward model is worth."""
    known = json.loads(REWARD_MODEL.read_text(encoding="utf-8"))
    return wrapped(
        f"The reward model learnt from {known['pairs']:,} pairs of the base's samples, labelled by gold, and "
        f"ranks {known['accuracy_after']:.2f} [{known['accuracy_low']:.2f}, {known['accuracy_high']:.2f}] of "
        f"{known['held_out_pairs']} held-out pairs as gold does. Its column is the mean difference of its "
        "reward, after minus before, on the same prompts."
    )


def wrapped(text: str) -> list[str]:
    """Lines of a paragraph of a document."""
    return textwrap.wrap(text, 118, break_on_hyphens=False, break_long_words=False)


def paragraph(rows: Sequence[dict[str, Any]], method: str) -> list[str]:
    """One method's rows in words."""
    told = []
    for reward in ("data", "gold", "model"):
        own = rows_of_one(rows, method, reward)
        if not own:
            continue
        mean = partial(mean_of, own)
        low, high = interval_of(own)
        text = (
            f"{FROM[reward]}, {len(own)} seed{'s' if len(own) > 1 else ''}: mean reward "
            f"{mean('reward_before'):.2f} → {mean('reward_after'):.2f}, win rate over the base "
            f"{mean('win_rate'):.2f} [{low:.2f}, {high:.2f}], KL to the base {mean('kl'):.1f} nats, "
            f"{mean('length_after'):.0f} tokens per answer."
        )
        if any("model_gain" in row for row in own):
            gain = mean("model_gain")
            side = "above" if gain >= 0 else "below"
            text += f" A reward model scores its answers {abs(gain):.2f} (log-odds) {side} the base's."
        trained = mean("logps_training")
        text += f" At the end, a training token has a mean log-probability of {trained:.2f} nats"
        if all(row.get("logps_fresh") for row in own):
            text += f", and a token of the policy's own answers {mean('logps_fresh'):.2f}."
        elif all(row["logps_sampled"] for row in own):
            text += (
                "; for the last samples that it learnt from, it was "
                f"{mean('logps_sampled'):.2f} under the policy that drew them."
            )
        else:
            text += "."
        told.append(text[0].upper() + text[1:])
    machine = rows_of_one(rows, method, None)[-1]["machine"]
    rate = f"{POLICY['lr']:.0e}".replace("e-0", "e-")
    whole = (
        "In the comparison of all methods ([docs](../comparison.md), "
        f"`experiments/all_methods.py`: SmolLM2-135M-Instruct, LoRA, learning rate {rate}, {STEPS} steps of "
        f"{BATCH}, {COMPLETIONS} sampled completions of at most {NEW_TOKENS} tokens, VADER's sentiment as "
        f"gold, the true reward), on {rows[0]['compared']} held-out prompts. {' '.join(told)} One core of an "
        f"{machine['processor']}, float32, {machine['date']}."
    )
    return wrapped(whole)


FROM = {
    "data": "from pairs or demonstrations that gold labelled",
    "gold": "with gold as the reward",
    "model": "with a reward model that learnt from gold's labels",
}


def rows_of_one(rows: Sequence[dict[str, Any]], method: str, reward: str | None) -> list[dict[str, Any]]:
    """A method's rows by seed, those of one source of rewards or all."""
    own = [row for row in rows if row["method"] == method and reward in (None, row["reward"])]
    return sorted(own, key=lambda row: row["seed"])


def mean_of(rows: Sequence[dict[str, Any]], name: str) -> float:
    """Over the rows that know it."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return sum(known) / len(known) if known else float("nan")


if __name__ == "__main__":
    main()
