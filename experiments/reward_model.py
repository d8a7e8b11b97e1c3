"""Train a reward model on real preferences and test it on pairs of unseen prompts.

The data are a file of pairs with columns prompt, chosen, rejected, or a directory with such a file called
preferences-train.jsonl.gz. The script splits the pairs by prompt and trains the embedded model with a scalar
head or as a pairwise ranker. It reports the accuracy on held-out pairs with an interval, the calibration, and
the accuracy on pairs whose chosen answer is shorter. For comparison, it reports the accuracy of always
preferring the longer answer, on the same pairs and on all pairs.

    python experiments/reward_model.py --data preferences-train.jsonl.gz --kind ranker
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import palate
from machine import machine
from offline_dpo import longer_wins, split_by_prompt
from palate.quiet import quiet_libraries
from palate.types import Comparison

RESULTS = Path(__file__).parent / "results"
PAIRS_FILE = "preferences-train.jsonl.gz"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="file of pairs, or directory with one")
    parser.add_argument(
        "--output", type=Path, help="result file; default: experiments/results/reward_model_KIND.json"
    )
    parser.add_argument(
        "--run", type=Path, help="directory of the run, kept so that it can be resumed; default: temporary"
    )
    parser.add_argument("--kind", choices=("pointwise", "ranker"), default="pointwise")
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument(
        "--max-characters", type=int, default=1500, help="of prompt, chosen and rejected each"
    )
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--eval-every", type=int, help="steps between measurements, besides first and last")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--schedule", choices=("constant", "linear", "cosine"), default="linear")
    parser.add_argument("--full", action="store_true", help="train all weights instead of an adapter")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(
    given: argparse.Namespace, learnt: list[Comparison], unseen: list[Comparison], scratch: Path
) -> tuple[palate.Outcome, Any]:
    """Train, and return the run and its configuration."""
    for name, part in (("train", learnt), ("test", unseen)):
        palate.write_rows(
            scratch / f"{name}.jsonl",
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
    config = palate.METHODS["reward-model"].config.model_validate(
        {
            "kind": given.kind,
            "data": str(scratch / "train.jsonl"),
            "eval_data": str(scratch / "test.jsonl"),
            "epochs": given.epochs,
            "batch_size": given.batch_size,
            "eval_every": given.eval_every,
            "lr": given.lr,
            "schedule": given.schedule,
            "lora": not given.full,
            "device": given.device,
            "seed": given.seed,
            "output": given.run or scratch / "run",
        }
    )
    return palate.train("reward-model", config, display=palate.Display()), config


def main() -> None:
    given = arguments()
    quiet_libraries()
    rows, _ = palate.read_comparisons(str(given.data / PAIRS_FILE if given.data.is_dir() else given.data))
    short = [
        r
        for r in rows
        if max(len(r.prompt.text), len(str(r.chosen)), len(str(r.rejected))) <= given.max_characters
    ]
    learnt, unseen = split_by_prompt(list(short), given.pairs, given.held_out, given.seed)
    # A run that is kept can only be resumed if its data stay in the same place.
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) if given.run is None else given.run.with_name(f"{given.run.name}-data")
        place.mkdir(parents=True, exist_ok=True)
        outcome, config = train(given, learnt, unseen, place)
        log = (outcome.run.directory / "metrics.jsonl").read_text().splitlines()
    measured = [row for row in map(json.loads, log) if "eval_ece" in row]
    facts = ("steps", "seconds", "checkpoint", "method", "pairs_dropped")
    result = {
        "script": "experiments/reward_model.py",
        "kind": given.kind,
        "trained": "all weights" if given.full else "LoRA",
        "lr": config.lr,
        "schedule": config.schedule,
        "batch_size": config.batch_size,
        "epochs": given.epochs,
        "steps": outcome.summary["steps"],
        "max_characters": given.max_characters,
        "seed": given.seed,
        "training_prompts": len({row.prompt.id for row in learnt}),
        "held_out_prompts": len({row.prompt.id for row in unseen}),
        **{name: value for name, value in outcome.summary.items() if name not in facts},
        "accuracy_by_step": {row["step"]: round(row["eval_accuracy"], 4) for row in measured},
        "longer_wins_in_characters": longer_wins(unseen),
        "longer_wins_in_characters_of_all": longer_wins(rows),
        "pairs_of_all": len(rows),
        "seconds": outcome.summary["seconds"],
        "machine": machine(),
    }
    output = given.output or RESULTS / f"reward_model_{given.kind}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=2)
    output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
