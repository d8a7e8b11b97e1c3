"""Runs of every method keep within their plans: what they sample, annotate and learn, on a tiny model."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

import palate
from palate.methods import METHODS
from palate.planning.counts import steps_of_run
from palate.planning.plan import plan_run

REWARD = """
def letters(completions, completion_ids):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, t)) % 101 + len(ids) / 7 for t, ids in zip(texts, completion_ids)]
"""
OWN: dict[str, dict[str, Any]] = {
    "rso": {"n": 6, "accept": 4},
    "click": {"n": 6, "threshold": 50.0},
    "rest": {"thresholds": [0.0], "validation": 1},
    "rlhf": {"ppo_epochs": 2, "mini_batches": 2},
    "rlaif": {"ppo_epochs": 2, "reward_steps": 1},
    "oaif": {"n": 3, "kl_every": 1, "kl_prompts": 2},
}
"""Options that suit the few rows, or that add work."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"question {i % 5}"} for i in range(6)],  # one repeats
    "pairs": [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"oh no {i * i}"} for i in range(8)
    ],
    "demonstrations": [{"prompt": f"question {i}", "completion": f"yes {i}"} for i in range(8)],
}
WAYS = [(name, way.variants[:1]) for name, method in sorted(METHODS.items()) for way in method.ways]
NEEDS_JUDGE = {"d-rlaif"}


def configured(name: str, variants: tuple[str, ...], tiny: str, folder: Path) -> Any:
    method = METHODS[name]
    way = method.variant(variants[0] if variants else None)
    for part, count in (("train", 8), ("held_out", 3)):
        rows = ROWS[way.learns_from][:count]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    options = {
        "model": tiny, "data": str(folder / "train.jsonl"), "eval_data": str(folder / "held_out.jsonl"),
        "output": folder / "run", "reward": f"{folder / 'rewards.py'}:letters", "rounds": 2, "steps": 2,
        "batch_size": 4, "max_new_tokens": 6, "lora_rank": 2, "dtype": "float32", "device": "cpu",
        "lr": 1e-2, "fresh_prompts": 2, "top_p": 0.95, **OWN.get(name, {}),
    }  # fmt: skip
    if name in ("rlhf", "rlaif"):
        del options["top_p"]
    known = {key: value for key, value in options.items() if key in way.config.model_fields}
    values = {**known, **({"variant": variants[0]} if variants else {})}
    if NEEDS_JUDGE.intersection(variants):
        del values["reward"]
        values["judge"] = f"local:{tiny}"
    return method.configure(values)


@pytest.mark.parametrize(("name", "variants"), [w for w in WAYS if not NEEDS_JUDGE.intersection(w[1])])
def test_runs_keep_within_their_plans(
    name: str, variants: tuple[str, ...], tiny: str, tmp_path: Path
) -> None:
    cfg = configured(name, variants, tiny, tmp_path)
    plan = plan_run(METHODS[name], cfg, count=0)
    done = palate.train(name, cfg, display=None)

    completions, tokens, rewards = journal(done.directory / "journal.db")
    assert completions <= sum(plan.completions.values())
    assert tokens <= plan.sampled.most
    assert rewards <= plan.annotating.scored + plan.training.referenced
    assert done.run.step_count <= steps_of_run(cfg, plan.training)
    rows = [json.loads(line) for line in (done.directory / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("num_tokens", 0) for row in rows if "loss" in row) <= plan.learned.most * 2
    assert plan.seconds is None
    assert plan.sampled.expected is None


def journal(path: Path) -> tuple[int, int, int]:
    """The completions of a run, their tokens, and its stored rewards."""
    with sqlite3.connect(path) as db:
        (count, size) = db.execute(
            "SELECT count(*), coalesce(sum(length(token_ids)), 0) FROM completions"
        ).fetchone()
        (rewards,) = db.execute("SELECT count(*) FROM rewards").fetchone()
    return count, size // 4, rewards


def test_a_plan_that_samples_all_is_exact(tiny: str, tmp_path: Path) -> None:
    """The bound is no looser than it must be: without ties or repeats, a run spends all of it."""
    cfg = configured("oaif", (), tiny, tmp_path)
    plan = plan_run(METHODS["oaif"], cfg, count=0)
    done = palate.train("oaif", cfg, display=None)
    assert journal(done.directory / "journal.db")[0] == sum(plan.completions.values())


def test_a_pilot_gives_expectations(tiny: str, tmp_path: Path) -> None:
    cfg = configured("oaif", (), tiny, tmp_path)
    plan = plan_run(METHODS["oaif"], cfg, count=4)
    assert plan.sampled.expected is not None
    assert 0 < plan.sampled.expected <= plan.sampled.most
    assert plan.seconds is not None
    assert plan.seconds.total > 0
    assert plan.memory.peak > plan.memory.resident > 0


JUDGED = [("oaif", ()), ("rlaif", ("rlaif",)), ("rlaif", ("d-rlaif",)), ("iterative-dpo", ())]


@pytest.mark.parametrize(("name", "variants"), JUDGED)
def test_judges_keep_within_their_plans(
    name: str, variants: tuple[str, ...], tiny: str, tmp_path: Path
) -> None:
    scores = variants == ("d-rlaif",)
    two = "{{ prompt }}{{ first }}{{ second }}{{ label_first }}{{ label_second }}"
    (tmp_path / "question.jinja").write_text("{{ prompt }}{{ completion }}" if scores else two)
    given = configured(name, variants, tiny, tmp_path)
    changes = {
        "reward": (), "judge": f"local:{tiny}", "judge_template": tmp_path / "question.jinja",
        "judge_label_mass": 0.0, "probe_pairs": 2, "tie": 0.0,
    }  # fmt: skip
    changes = {key: value for key, value in changes.items() if key in type(given).model_fields}
    cfg = type(given).model_validate({**given.model_dump(), **changes})
    plan = plan_run(METHODS[name], cfg, count=0)
    assert plan.verdicts is not None
    assert plan.judge_read is not None
    assert plan.judge_written is not None
    assert plan.dollars is not None
    done = palate.train(name, cfg, display=None)
    assert 0 < done.summary["judge_verdicts"] <= plan.verdicts.most
    assert done.summary["judge_tokens"] <= plan.judge_read.most + plan.judge_written.most
    assert done.summary["judge_cost"] == plan.dollars.most == 0
