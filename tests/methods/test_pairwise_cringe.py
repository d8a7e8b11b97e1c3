from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from palate.data import write_rows
from palate.errors import ConfigError
from palate.methods import METHODS
from palate.methods.pairwise_cringe import PairwiseCringeConfig
from palate.types import Group, Prompt

Taught = Callable[..., Any]
Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]


@pytest.mark.parametrize("lora", [False, True])
def test_the_reward_rises(taught: Taught, lora: bool) -> None:
    # The mean of runs, since one differs from another. An adapter on the layers of a random model can do less
    # than all weights, so that it gets more prompts and larger batches.
    prompts = [Prompt(f"q{i}") for i in range(64 if lora else 16)]
    more = {"lr": 4e-2, "batch_size": 16} if lora else {"lr": 1e-2}
    whole = {"lora": lora, "temperature": 1.0, "top_p": 1.0, "n": 8, "rounds": 2, "steps": 20, **more}
    runs = [taught("pairwise-cringe", None, prompts, seed=seed, **whole) for seed in range(2 if lora else 3)]
    assert fmean(found.rise for found in runs) > 0.1
    first, last = (fmean(found.rows[i]["objective/scores"] for found in runs) for i in (0, -1))
    assert first < last  # the second round samples from what the first has taught


def measured(found: list[dict[str, Any]], name: str) -> list[float]:
    """A held-out number, from before to after."""
    return [row[f"eval_{name}"] for row in found if f"eval_{name}" in row]


@pytest.mark.parametrize("gate_gradient", [False, True])
@pytest.mark.parametrize(("lora", "lr", "steps"), [(False, 1e-2, 20), (True, 3e-2, 40)], ids=["full", "lora"])
def test_held_out_pairs_come_to_be_ranked(
    fitted: Fitted, lora: bool, lr: float, steps: int, gate_gradient: bool
) -> None:
    # Ranked by log-probability alone, in which completions of 4 to 16 tokens differ by their lengths first.
    options = {"variant": "direct", "lora": lora, "lr": lr, "steps": steps}
    found, _ = fitted("pairwise-cringe", gate_gradient=gate_gradient, **options)
    before, after = measured(found, "rewards/accuracies")
    assert after > before + 0.1
    assert measured(found, "rewards/margins")[1] > measured(found, "rewards/margins")[0] + 10
    assert measured(found, "gate")[1] < 0.7 * measured(found, "gate")[0]  # pairs in order are let go
    assert measured(found, "loss")[1] < 0.7 * measured(found, "loss")[0]


def test_every_step_draws_other_contrasts(fitted: Fitted) -> None:
    # With one pair, a learning rate of next to nothing and k > 1, only the draws tell steps apart.
    options = {"variant": "direct", "pairs": 1, "held_out": 0, "batch_size": 1, "lr": 1e-12, "k": 8}
    found, _ = fitted("pairwise-cringe", steps=6, **options)
    losses = [row["cringe_loss"] for row in found]
    assert len(set(losses)) > 1
    assert max(row["nll_loss"] for row in found) == pytest.approx(min(row["nll_loss"] for row in found))
    again, _ = fitted("pairwise-cringe", steps=6, **options)
    assert [row["cringe_loss"] for row in again] == losses


def test_numbers_reach_the_loss(fitted: Fitted) -> None:
    def first(**options: Any) -> dict[str, Any]:
        return fitted("pairwise-cringe", variant="direct", steps=1, held_out=0, **options)[0][0]

    shut = first(b=-1e6, tau=1.0)
    assert shut["gate"] == shut["loss"] == shut["grad_norm"] == 0.0
    wide, without = (first(b=1e6, tau=1.0, alpha=a) for a in (1.0, 0.0))
    assert wide["gate"] == 1.0
    assert wide["loss"] > without["loss"] > 0  # the Cringe term adds what alpha says
    detached, flowing = (first(gate_gradient=g)["grad_norm"] for g in (False, True))
    assert detached != pytest.approx(flowing, rel=1e-3)


def test_the_policy_labels_its_own_completions(taught: Taught, tmp_path: Path) -> None:
    def never(groups: Sequence[Group]) -> list[Group]:
        raise AssertionError("the annotator was asked")

    rows = [{"prompt": f"q{i}", "chosen": "ABCDEF"[i:] + "X", "rejected": "abcdef"[i:]} for i in range(6)]
    write_rows(tmp_path / "pairs.jsonl", rows)
    options = {"rounds": 2, "pairs": str(tmp_path / "pairs.jsonl"), "label": "implicit", "lr": 1e-2}
    found = taught("pairwise-cringe", never, mix_pairs=True, **options)
    assert [row["round"] for row in found.rows] == [1] * 3 + [2] * 3
    assert found.rows[3]["pairs/kept"] > 8
    assert found.rows[3]["objective/scores_margin"] > 0


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"alpha": -1.0}, {"k": 0}, {"variant": "both"}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PairwiseCringeConfig(data="x", **wrong)


def test_pairs_from_two_places() -> None:
    with pytest.raises(ConfigError, match=r"variant is direct.* so pairs would do nothing; leave it out"):
        METHODS["pairwise-cringe"].configure({"data": "x", "variant": "direct", "pairs": "y"})


def test_defaults() -> None:
    cfg = PairwiseCringeConfig(data="x")
    assert (cfg.b, cfg.tau, cfg.alpha, cfg.k, cfg.gate_gradient, cfg.variant) == (0, 10, 1, 1, True, "rounds")
