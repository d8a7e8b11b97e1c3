from __future__ import annotations

import ast
from pathlib import Path

import pytest

import palate
from palate.cli.commands.runs import LATEST
from palate.metrics import HELD_OUT, METRICS, PART, label, of_samples
from palate.report.catalogue import PANELS
from palate.run.display import SHOWN

SOURCE = Path(str(palate.__file__)).parent
WRITERS = ("annotate", "learn", "loops", "methods", "run", "evaluate.py", "launch", "calibration.py")
FAMILIES = tuple(sorted({name.split("/")[0] + "/" for name in METRICS if "/" in name} - {"time/"}))


def texts_of(parts: tuple[str, ...]) -> set[str]:
    """Every string in some parts of the source that is neither an f-string's nor a docstring."""
    files = [
        f
        for part in parts
        for f in ([SOURCE / part] if part.endswith(".py") else (SOURCE / part).rglob("*.py"))
    ]
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_what_is_written_is_declared() -> None:
    written = {t for t in texts_of(WRITERS) if t.startswith(FAMILIES) and not t.endswith(("/", "_"))}
    assert len(written) > 20
    assert written <= METRICS.keys()


def test_what_is_declared_is_written() -> None:
    texts = texts_of(WRITERS)
    figures = {f"judge/{name}" for name in texts_of(("ranking.py", "loops/grading.py"))}
    written = texts | {text.removeprefix(HELD_OUT) for text in texts} | figures
    assert {name for name in METRICS if not name.startswith("time/")} <= written


def test_what_is_shown_is_declared() -> None:
    drawn = {curve.metric.removeprefix(HELD_OUT) for panel in PANELS for curve in panel.curves}
    shown = {name for name, _ in SHOWN} | {name.removeprefix(HELD_OUT) for name in LATEST}
    measured = {"win_rate", "accuracy_shorter", "ece"}  # held out alone
    dropped = {name for name in drawn if name.startswith("pairs/dropped_")}
    assert (drawn | shown) - measured - dropped <= METRICS.keys()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("objective/scores", True), (f"{PART}length", True), ("pairs/dropped_tie", True),
        ("logps/fresh", True),
        ("loss", False), ("objective/kl", False), ("eval_objective/scores", False), ("unheard", False),
    ],
)  # fmt: skip
def test_numbers_of_samples(name: str, expected: bool) -> None:
    assert of_samples(name) == expected


def test_labels() -> None:
    assert label("rewards/accuracies") == "accuracy"
    assert label("eval_rewards/accuracies") == "held-out accuracy"
    assert label("mine/own") == "mine/own"
