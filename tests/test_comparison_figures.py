"""The scripts of the comparison write documents from any result of `palate compare`."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from palate.comparison.arms import BASE
from palate.comparison.results import sentences
from palate.effects import Difference
from palate.evaluation.numbers import finite

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
METHODS = {"sft": 0.5, "rft": None, "oaif": 0.7, "rlaif": 0.4}
"""Mean rewards; rft has no usable number."""


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    names = ("comparison_rows", "comparison", "measured", "placing", "frontier")
    return {name: importlib.import_module(name) for name in names}


def row_of(method: str, reward: float | None, seeds: int) -> dict[str, Any]:
    known = reward is not None
    numbers = {
        name: number if known else None
        for name, number in {
            "reward": reward, "reward_low": 0.4, "reward_high": 0.6, "win_rate": 0.6, "win_rate_low": 0.5,
            "win_rate_high": 0.7, "kl": 1.5, "kl_low": 1.0, "kl_high": 2.0,
            "length_controlled_win_rate": 0.55, "cpu_seconds": 120.4, "peak_memory_gb": 2.5,
        }.items()
    }  # fmt: skip
    return {
        "name": method, "method": method, "seeds": list(range(seeds)), "lr": 1e-4 if known else None,
        "reward_by_seed": [reward] * seeds, "win_rate_by_seed": [numbers["win_rate"]] * seeds,
        "tokens_each": 38.2, "ended": 0.1, "tokens": 24_500.0, "completions": 640.0, "verdicts": 640.0,
        "cost": 0.0, "seconds": 300.0, "steps": 10.0, "models": "2", **numbers,
    }  # fmt: skip


def write_comparison(directory: Path, seeds: int, learnt_reward: bool = True) -> None:
    """Write the files of a finished comparison."""
    nan, several = float("nan"), seeds > 1
    found = [
        Difference(BASE, "oaif", -0.4, -0.5, -0.3, 1e-6, 1e-5, seeds=several),
        Difference(BASE, "sft", -0.1, -0.3, 0.1, 0.3, 0.6, seeds=several),
        Difference(BASE, "rft", nan, nan, nan, 1.0, 1.0, seeds=several),
        Difference("oaif", "rlaif", 0.3, 0.2, 0.4, 1e-4, 1e-3, seeds=several),
        Difference("oaif", "sft", 0.2, 0.1, 0.3, 1e-3, 0.01, seeds=several),
    ]
    points = [
        {"arm": name, "seed": seed, "step": step, "reward": reward, "kl": step / 5, "result": step == 10}
        for name, reward in METHODS.items()
        for seed in range(seeds)
        for step in (5, 10)
    ]
    summary = {
        "budget": {"unit": "tokens", "amount": 25_000, "steps": 10},
        "annotator": "sentiment", "gold": "", "model": "smollm2", "test_prompts": 100, "seeds": seeds,
        "base": {"name": BASE, "reward": 0.3, "tokens": 38.0, "ended": 0.1},
        "methods": [row_of(name, reward, seeds) for name, reward in METHODS.items()],
        "matrix": {"names": [], "cells": []},
        "differences": [{**vars(d), "clear": d.clear} for d in found],
        "sentences": sentences(found, "mean reward"),
        "frontier_prompts": 32, "frontier": points, "tuned": True, "pairwise": False,
    }  # fmt: skip
    settings = {
        "data": "everyday", "batch_size": 16, "max_new_tokens": 40, "temperature": 1.0, "model": "smollm2",
        "learnt_reward": learnt_reward, "tune": "lr", "tune_factors": [1.0, 3.0], "points": 3, "seed": 0,
        "device": "cpu", "dtype": "float32", "passed": {"lora_rank": "16"},
    }  # fmt: skip
    tuning = {name: {"chosen": 1e-4, "rewards": {"0.0001": 0.4, "0.0003": None}} for name in METHODS}
    (directory / "runs").mkdir(parents=True)
    rows = ({"began": f"2026-11-{day}T12:00:00+0000"} for day in (28, 29))
    (directory / "runs" / "sft-0.usage.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    files = {"summary": finite(summary), "compare": {"settings": settings}, "tuning": tuning}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.fixture(params=[1, 2])
def result(request: pytest.FixtureRequest, scripts: dict[str, ModuleType], tmp_path: Path) -> dict[str, Any]:
    write_comparison(tmp_path / "done", request.param)
    scripts["comparison_rows"].write_rows(tmp_path / "done", None, tmp_path / "rows.json")
    rows: dict[str, Any] = scripts["comparison_rows"].rows(tmp_path / "rows.json")
    return rows


# ---- Copied numbers --------------------------------------------------------------------------------


def test_only_what_documents_need_is_copied(result: dict[str, Any], tmp_path: Path) -> None:
    assert str(tmp_path) not in json.dumps(result)
    assert "matrix" not in result
    assert result["dates"] == ["2026-11-28", "2026-11-29"]
    assert result["machine"]["dtype"] == "float32"
    sources = {row["name"]: row["learns_from"] for row in result["methods"]}
    assert sources == {"sft": "data", "rft": "model", "oaif": "gold", "rlaif": "own"}


def test_without_a_shared_reward_model_methods_ask_the_annotator(scripts: dict[str, ModuleType]) -> None:
    source_of = scripts["comparison_rows"].source_of
    assert source_of("rft", learnt_reward=False) == "gold"
    assert source_of("rlhf", learnt_reward=True) == "model"


def test_methods_measured_without_the_reward_model_have_rows_of_both(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    write_comparison(tmp_path / "one", 1)
    write_comparison(tmp_path / "two", 1, learnt_reward=False)
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    summary["methods"] = [row_of("rft", 0.9, 1)]
    (tmp_path / "two" / "summary.json").write_text(json.dumps(summary))
    scripts["comparison_rows"].write_rows(tmp_path / "one", tmp_path / "two", tmp_path / "rows.json")
    rows = scripts["comparison_rows"].rows(tmp_path / "rows.json")
    (own,) = rows["direct"]
    assert (own["name"], own["learns_from"]) == ("rft", "gold")
    assert "From the annotator itself" in " ".join(scripts["comparison"].paragraph(rows, rows["methods"][1]))
    assert "From the annotator itself" not in " ".join(
        scripts["comparison"].paragraph(rows, rows["methods"][0])
    )
    assert sum("`rft`" in line for line in scripts["comparison"].table(rows)) == 2
    labels = [row["labels"] for row in scripts["measured"].summaries(rows) if row["method"] == "rft"]
    assert labels == ["gold"]  # its row with the reward model has no usable number
    assert {p.method: p.reward for p in scripts["frontier"].points(rows)}["rft"] == 0.9
    assert "rft" not in {p.method for p in scripts["frontier"].earlier(rows)}


def test_an_unfinished_comparison_is_refused(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="has not ended"):
        scripts["comparison_rows"].write_rows(tmp_path)
    with pytest.raises(SystemExit, match="--from DIR --write"):
        scripts["comparison_rows"].rows(tmp_path / "none.json")


def test_no_number_is_not_finite(scripts: dict[str, ModuleType]) -> None:
    assert scripts["comparison_rows"].short({"a": [float("nan"), 0.123456789]}) == {"a": [None, 0.12346]}


# ---- Documents -------------------------------------------------------------------------------------


def test_the_best_method_comes_first_and_unknown_numbers_are_dashes(
    result: dict[str, Any], scripts: dict[str, ModuleType]
) -> None:
    head, _, *rows = scripts["comparison"].table(result)
    assert [row.split("`")[1] for row in rows] == ["oaif", "sft", "rlaif", "rft"]
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert "| 0.30 → 0.70 [0.40, 0.60] | 0.60 [0.50, 0.70] |" in rows[0]
    assert "| 0.30 → — | — |" in rows[-1]
    assert "annotator, through its own reward model" in rows[2]


def test_every_part_of_every_document_is_text(result: dict[str, Any], scripts: dict[str, ModuleType]) -> None:
    pages = scripts["comparison"].documents(result)
    assert {page.stem for page in pages} == {"comparison", *METHODS}
    for page, parts in pages.items():
        assert page.is_file()
        for lines in parts.values():
            text = "\n".join(lines)
            assert not re.search(r"\b(nan|None|inf)\b", text)
            assert all(len(line) <= 120 or line.startswith("|") for line in lines)


def test_what_the_intervals_cover_depends_on_the_seeds(
    result: dict[str, Any], scripts: dict[str, ModuleType]
) -> None:
    expected = "but not other seeds" if result["seeds"] == 1 else "and other seeds"
    oaif = next(row for row in result["methods"] if row["name"] == "oaif")
    script = scripts["comparison"]
    for lines in (script.note(result), script.paragraph(result, oaif)):
        assert expected in " ".join(lines)
    closing = "prompts only" if result["seeds"] == 1 else "other seeds and other prompts"
    assert closing in " ".join(script.differences(result))


def test_clear_differences_are_grouped_by_the_better_method(
    result: dict[str, Any], scripts: dict[str, ModuleType]
) -> None:
    text = " ".join(" ".join(scripts["comparison"].differences(result)).split())
    assert "3 of the 5 differences in mean reward are clear" in text
    assert (
        "1 method has a higher mean reward than the model before training: `oaif` by 0.40 [0.30, 0.50]."
        in text
    )
    assert "do not separate `sft`, `rlaif` and `rft` from the model before training" in text
    assert "- `oaif` has a higher mean reward than `sft` by 0.20 [0.10, 0.30] and `rlaif` by 0.30" in text


def test_a_paragraph_names_the_rates_that_were_tried(
    result: dict[str, Any], scripts: dict[str, ModuleType]
) -> None:
    oaif = next(row for row in result["methods"] if row["name"] == "oaif")
    text = " ".join(scripts["comparison"].paragraph(result, oaif))
    assert "a learning rate of 1e-4 (also tried: 3e-4)" in text
    assert "SmolLM2-135M-Instruct, LoRA of rank 16, 25,000 sampled tokens" in text
    assert "120 seconds of processor time." in text


def test_plans_get_the_rows_that_are_known(result: dict[str, Any], scripts: dict[str, ModuleType]) -> None:
    rows = scripts["measured"].summaries(result)
    assert {row["method"]: row["labels"] for row in rows} == {"sft": "data", "oaif": "gold", "rlaif": "gold"}
    assert {row["seeds"] for row in rows} == {result["seeds"]}
    assert len(scripts["measured"].measured(rows)) == 2 + len(rows)


# ---- The picture -----------------------------------------------------------------------------------


def test_the_chart_has_a_point_for_each_known_method(
    result: dict[str, Any], scripts: dict[str, ModuleType]
) -> None:
    frontier = scripts["frontier"]
    assert [point.method for point in frontier.points(result)] == ["sft", "oaif", "rlaif"]
    assert len(frontier.earlier(result)) == 3  # the mean over the seeds of one step each
    text = frontier.chart(result, frontier.THEMES["light"])
    assert text.startswith("<?xml")
    assert text == frontier.chart(result, frontier.THEMES["light"])


@pytest.mark.parametrize("spread", [5.0, 60.0, 280.0])
def test_labels_cover_neither_points_nor_labels(scripts: dict[str, ModuleType], spread: float) -> None:
    placing = scripts["placing"]
    places = [(7 * i % 11 / 11, 5 * i % 13 / 13) for i in range(15)]
    spots = [placing.Spot(200 + spread * x, 120 + spread / 3 * y, 50.0, 10.0) for x, y in places]
    frame = placing.Box(0, 0, 500, 300)
    labels = placing.place(spots, frame, mark=2.0)
    points = [placing.Box(s.x - 2, s.y - 2, s.x + 2, s.y + 2) for s in spots]
    for i, label in enumerate(labels):
        others = [*labels[:i], *labels[i + 1 :], *points]
        assert label.shared(frame) == pytest.approx(label.area)
        if spread > 5:  # points in one heap leave no free place for all
            assert not any(label.shared(other) for other in others)
