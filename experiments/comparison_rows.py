"""Numbers of the comparison of methods that documents need, copied from a directory of `palate compare`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from machine import machine
from palate.comparison.arms import Arm
from palate.config.parts import ModelConfig
from palate.methods import METHODS
from palate.model.device import resolve

RESULTS = Path(__file__).parent / "results" / "comparison.json"

SETTINGS = (
    "data", "batch_size", "max_new_tokens", "temperature", "learnt_reward", "tune", "tune_factors", "points",
    "seed",
)  # fmt: skip
"""Settings of the comparison that documents name. None of them is a path of this machine."""
OF_BASE = ("name", "reward", "tokens", "ended")
WITH_INTERVAL = ("reward", "win_rate", "kl")
OF_METHOD = (
    "name", "method", "lr", "seeds", "reward_by_seed", "win_rate_by_seed", "length_controlled_win_rate",
    "tokens_each", "ended", "tokens", "completions", "verdicts", "steps", "cpu_seconds", "peak_memory_gb",
    "models",
    *(f"{name}{end}" for name in WITH_INTERVAL for end in ("", "_low", "_high")),
)  # fmt: skip
OF_DIFFERENCE = ("one", "other", "mean", "low", "high", "adjusted", "seeds", "clear")
OF_POINT = ("arm", "seed", "step", "reward", "kl", "result")
"""Names that are copied from the parts of `summary.json`."""

DIGITS = 5
"""Significant digits that are kept."""


def rows(file: Path = RESULTS) -> dict[str, Any]:
    """Return the copied numbers.

    Raises:
        SystemExit: nothing has been copied yet.
    """
    if not file.is_file():
        raise SystemExit(f"{file.name} does not exist; run experiments/comparison.py --from DIR --write")
    copied: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return copied


def write_rows(directory: Path, direct: Path | None = None, file: Path = RESULTS) -> None:
    """Copy the numbers of a finished comparison.

    Args:
        directory: of the comparison.
        direct: of another one, in which the methods that learn from a reward model ask the annotator itself;
            its rows are copied as `direct`.
        file: the copy.

    Raises:
        SystemExit: a comparison has not ended.
    """
    copied = copy_of(directory)
    copied["direct"] = copy_of(direct)["methods"] if direct is not None else []
    file.write_text(json.dumps(copied, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def copy_of(directory: Path) -> dict[str, Any]:
    """Return what documents need of a directory of `palate compare`.

    Raises:
        SystemExit: the comparison has not ended.
    """
    missing = [name for name in ("summary.json", "compare.json") if not (directory / name).is_file()]
    if missing:
        raise SystemExit(f"{directory} lacks {' and '.join(missing)}: `palate compare` has not ended there")
    summary = read(directory / "summary.json")
    settings = read(directory / "compare.json")["settings"]
    tuning = read(directory / "tuning.json") if (directory / "tuning.json").is_file() else {}
    learnt = bool(settings.get("learnt_reward"))
    copied = {
        **{name: summary.get(name) for name in ("budget", "annotator", "model", "test_prompts", "seeds")},
        "settings": {
            **picked(settings, SETTINGS),
            "lora_rank": (settings.get("passed") or {}).get("lora_rank"),
        },
        "reward_model": reward_model(directory),
        "base": picked(summary["base"], OF_BASE),
        "methods": [
            {
                **picked(row, OF_METHOD),
                "learns_from": source_of(row["method"], learnt_reward=learnt),
                "tried": (tuning.get(row["name"]) or {}).get("rewards"),
            }
            for row in summary["methods"]
        ],
        "differences": [picked(row, OF_DIFFERENCE) for row in summary.get("differences", [])],
        "sentences": summary.get("sentences", []),
        "frontier_prompts": summary.get("frontier_prompts"),
        "frontier": [picked(row, OF_POINT) for row in summary.get("frontier", [])],
        # The runs have dates of their own.
        "machine": {k: v for k, v in machine().items() if k != "date"} | {"dtype": dtype(settings)},
        "dates": dates(directory),
    }
    shortened: dict[str, Any] = short(copied)
    return shortened


def source_of(method: str, *, learnt_reward: bool) -> str:
    """Return the source of a method's labels, which follows from its share and its recipe.

    `data`: the annotator labelled data beforehand; `gold`: the method asks the annotator; `own`: it trains a
    reward model of its own on the annotator's labels; `model`: it learns from the shared reward model.
    """
    known = METHODS[method]
    assert known.share is not None, f"{method} cannot be compared"
    if known.share.when in ("pairs", "demonstrations"):
        return "data"
    if known.share.labelled:
        return "own"
    learnt = learnt_reward and Arm(method, known, {}, known.share).asks_reward_model
    return "model" if learnt else "gold"


def reward_model(directory: Path) -> dict[str, Any] | None:
    """Return what is known of the shared reward model; None without one."""
    file = directory / "shared" / "reward-model" / "summary.json"
    return picked(read(file), ("pairs", "steps", "accuracy_after")) if file.is_file() else None


def dtype(settings: Mapping[str, Any]) -> str:
    """Return the number format of the weights on this machine, such as `bfloat16`."""
    cfg = ModelConfig.model_validate(picked(settings, ("model", "device", "dtype")))
    return str(resolve(cfg)[1]).removeprefix("torch.")


def dates(directory: Path) -> list[str]:
    """Return the first and the last day on which a run of the comparison began."""
    days = sorted({row["began"][:10] for row in usages(directory) if "began" in row})
    return list(dict.fromkeys([days[0], days[-1]])) if days else [str(machine()["date"])]


def usages(directory: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows in which the processes of the compared runs noted their beginnings and their usage."""
    for file in sorted((directory / "runs").glob("*.usage.jsonl")):
        yield from (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line)


def picked(row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values of these names; None for those that the row lacks."""
    return {name: row.get(name) for name in names}


def short(value: Any) -> Any:
    """Return the value with numbers of few digits, and None for those that JSON cannot express."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: short(v) for k, v in value.items()}
    return [short(v) for v in value] if isinstance(value, list | tuple) else value


def read(file: Path) -> dict[str, Any]:
    """Return the content of a JSON file."""
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
