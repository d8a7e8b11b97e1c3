"""Train with offline DPO on real preferences and test the implicit reward on pairs of unseen prompts.

The data are a file of pairs with columns prompt, chosen, rejected. The script splits it by prompt and trains
on 500 pairs. It reports the share of held-out pairs whose chosen answer has the higher implicit reward and,
for comparison, the share whose chosen answer is longer. Pairs are limited in length, so that training takes
minutes on two cores.

    python experiments/offline_dpo.py --data preferences.jsonl.gz --output offline_dpo.json
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

import palate
from machine import machine
from palate.quiet import quiet_libraries
from palate.types import Comparison


def split_by_prompt(
    rows: list[Comparison], train: int, held_out: int, seed: int
) -> tuple[list[Comparison], list[Comparison]]:
    """Return training pairs, and held-out pairs of other prompts."""
    prompts = sorted({row.prompt.id for row in rows})
    random.Random(seed).shuffle(prompts)
    test_prompts = set(prompts[: len(prompts) // 4])
    random.Random(seed + 1).shuffle(rows)
    inside = [row for row in rows if row.prompt.id not in test_prompts]
    outside = [row for row in rows if row.prompt.id in test_prompts]
    return inside[:train], outside[:held_out]


def longer_wins(rows: list[Comparison]) -> float:
    """Return the share of pairs whose chosen text is longer; a tie counts one half."""
    return sum(
        0.5 * ((len(r.chosen) > len(r.rejected)) + (len(r.chosen) >= len(r.rejected))) for r in rows
    ) / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", choices=("dpo", "ipo"), default="dpo")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--max-characters", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    quiet_libraries()

    rows, _ = palate.read_comparisons(given.data)
    short = [
        r
        for r in rows
        if max(len(r.prompt.text), len(str(r.chosen)), len(str(r.rejected))) <= given.max_characters
    ]
    train, held_out = split_by_prompt(short, given.pairs, given.held_out, given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in (("train", train), ("test", held_out)):
            palate.write_rows(
                Path(scratch) / f"{name}.jsonl",
                (
                    {
                        "prompt": r.prompt.content,
                        "chosen": r.chosen,
                        "rejected": r.rejected,
                        "chosen_finish": r.chosen_finish,
                        "rejected_finish": r.rejected_finish,
                    }
                    for r in part
                ),
            )
        config = palate.METHODS[given.method].config(
            data=f"{scratch}/train.jsonl",
            eval_data=f"{scratch}/test.jsonl",
            eval_every=16,
            epochs=given.epochs,
            lora=not given.full,
            lr=given.lr,
            seed=given.seed,
            output=Path(scratch) / "run",
        )
        outcome = palate.train(given.method, config, display=palate.Display())
        log = (outcome.run.directory / "metrics.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, log) if "eval_rewards/accuracies" in row]
    accuracy = measured[-1]["eval_rewards/accuracies"]
    prompts = len({row.prompt.id for row in held_out})
    result = {
        "script": "experiments/offline_dpo.py",
        "method": given.method,
        "trained": "all weights" if given.full else "LoRA",
        "lr": config.lr,
        "pairs": len(train),
        "held_out_pairs": len(held_out),
        "held_out_prompts": prompts,
        "epochs": given.epochs,
        "accuracy_before": measured[0]["eval_rewards/accuracies"],
        "accuracy_after": accuracy,
        "accuracy_low": measured[-1]["eval_rewards/accuracies_low"],
        "accuracy_high": measured[-1]["eval_rewards/accuracies_high"],
        "accuracy_by_step": {row["step"]: round(row["eval_rewards/accuracies"], 4) for row in measured},
        "logps_chosen_before": measured[0]["eval_logps/chosen"],
        "logps_chosen_after": measured[-1]["eval_logps/chosen"],
        "longer_wins": longer_wins(held_out),
        "seconds": outcome.summary["seconds"],
        "machine": machine(),
    }
    given.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
