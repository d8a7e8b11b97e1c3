"""Write the outputs of an evaluation in the formats of AlpacaEval and of lm-evaluation-harness."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from palate.errors import RunError
from palate.rundir import read_description, read_summary
from palate.rundir.files import SAMPLES, read_lines

Format = Literal["alpaca-eval", "lm-eval"]

TASK = "palate"
"""Name of the task in lm-eval's files, and of the data set in AlpacaEval's."""


def export(directory: Path, into: Path, form: Format) -> list[Path]:
    """Write one file, or two for lm-eval, for each side of an evaluation; return their paths.

    AlpacaEval reads `model_outputs.json`: a list of objects with instruction, output and generator.
    lm-eval's files are those that `lm_eval --log_samples` writes: results, and samples as JSON lines.

    Args:
        directory: the directory of a finished evaluation.
        into: the folder to write to; created.
        form: the format.

    Raises:
        RunError: the directory has no finished evaluation, or a file cannot be written.
    """
    if read_description(directory)["method"] != "evaluate":
        raise RunError(f"{str(directory)!r} is a training run; expected the directory of an evaluation")
    summary = read_summary(directory)
    rows, bad = read_lines(directory / SAMPLES, lambda line: line if "outputs" in line else None)
    if summary is None or not rows or bad:
        raise RunError(
            f"the evaluation in {str(directory)!r} is not finished or its {SAMPLES} is damaged; repeat its "
            "command"
        )
    names = [output["name"] for output in rows[0]["outputs"]]
    write = {"alpaca-eval": _alpaca_eval, "lm-eval": _lm_eval}[form]
    try:
        return [
            path
            for name, folder in zip(names, _folders(names), strict=True)
            for path in write(rows, summary, name, into / folder)
        ]
    except OSError as error:
        raise RunError(f"{str(into)!r} cannot be written: {error.strerror or error}") from None


def _alpaca_eval(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], name: str, folder: Path
) -> Iterator[Path]:
    outputs = [
        {"dataset": TASK, "instruction": row["prompt"], "output": own["text"], "generator": name}
        for row, own in _of(rows, name)
    ]
    yield _written(folder / "model_outputs.json", json.dumps(outputs, ensure_ascii=False, indent=1) + "\n")


def _lm_eval(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], name: str, folder: Path
) -> Iterator[Path]:
    lines = []
    for i, (row, own) in enumerate(_of(rows, name)):
        sample = {
            "doc_id": i,
            "doc": {"prompt": row["content"]},
            "target": "",
            "arguments": [[row["prompt"], {}]],
            "resps": [[own["text"]]],
            "filtered_resps": [own["text"]],
            "reward": own["reward"],
        }
        lines.append(json.dumps(sample, ensure_ascii=False))
    yield _written(folder / f"samples_{TASK}.jsonl", "\n".join(lines) + "\n")
    numbers = next(
        (model for model in summary["models"] if model["name"] == name), summary.get("baseline") or {}
    )
    metrics: dict[str, Any] = {"alias": TASK}
    for key, value in numbers.items():
        if isinstance(value, int | float) and not key.endswith("_standard_error"):
            metrics[f"{key},none"] = value
            error = "standard_error" if key == "win_rate" else f"{key}_standard_error"
            if numbers.get(error) is not None:
                metrics[f"{key}_stderr,none"] = numbers[error]
    result = {
        "results": {TASK: metrics},
        "n-samples": {TASK: {"original": len(rows), "effective": len(rows)}},
        "config": {"model": name},
        "model_name": name,
    }
    yield _written(folder / "results.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")


def _of(
    rows: Sequence[Mapping[str, Any]], name: str
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for row in rows:
        yield row, next(output for output in row["outputs"] if output["name"] == name)


def _written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def _folders(names: Sequence[str]) -> list[str]:
    """Return a folder for each side; names that become the same get a number."""
    plain = [_folder(name) for name in names]
    return [
        f"{name}-{before + 1}" if (before := plain[:i].count(name)) else name for i, name in enumerate(plain)
    ]


def _folder(name: str) -> str:
    """Return a name for a folder: the end of a path, with only plain characters."""
    return re.sub(r"[^\w.-]+", "-", name.strip("/"))[-80:].strip("-.") or "model"
