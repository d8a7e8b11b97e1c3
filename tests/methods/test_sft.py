from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from palate.methods.sft import SFTConfig

Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]


def measured(found: list[dict[str, Any]], name: str) -> list[float]:
    """A held-out number, from before to after."""
    return [row[f"eval_{name}"] for row in found if f"eval_{name}" in row]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_answers_become_likelier(fitted: Fitted, lora: bool, seed: int) -> None:
    found, _ = fitted("sft", lora=lora, seed=seed, steps=40, lr=3e-2 if lora else 1e-2)
    before, after = measured(found, "loss")
    # Who knows nothing of the 259 tokens loses log(259) = 5.56 nats on each; who knows that the answers are
    # capitals up to M, evenly drawn, log(13) = 2.57 on each but the end. An adapter that leaves the tiny
    # model's head as it is goes a part of the way.
    assert before > math.log(259)
    assert before - after > (1 if lora else 2)


def test_the_loss_is_the_mean_over_all_tokens(fitted: Fitted) -> None:
    found, _ = fitted("sft", steps=2)
    for row in found:
        prefix = "eval_" if "eval_loss" in row else ""
        assert row[f"{prefix}loss"] == pytest.approx(-row[f"{prefix}logps/training"], rel=1e-5)
    # Means over completions would not: these have 5 to 17 tokens each, and so their sum counts, too.
    (row, *_) = [row for row in found if "epoch" in row]
    assert row["loss"] == pytest.approx(-row["logps/completion"] * 8 / row["num_tokens"], rel=1e-5)


def test_steps_or_epochs(fitted: Fitted) -> None:
    rows, _ = fitted("sft", pairs=20, batch_size=8, epochs=2.0, steps=None, held_out=0)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["epoch"] == 2.0
    rows, _ = fitted("sft", pairs=20, batch_size=8, steps=1, held_out=0)
    assert len(rows) == 1


def test_micro_batches_change_nothing(fitted: Fitted) -> None:
    # Each has another number of tokens, and still the mean is over all.
    whole, parts = (fitted("sft", steps=3, micro_batch_tokens=n)[0] for n in (100_000, 60))
    for one, other in zip(whole, parts, strict=True):
        for name in ("loss", "grad_norm", "eval_loss"):
            assert one.get(name, math.nan) == pytest.approx(other.get(name, math.nan), rel=1e-4, nan_ok=True)


def test_batch_order_comes_from_the_seed(fitted: Fitted) -> None:
    one, again, other = (fitted("sft", steps=2, seed=seed, held_out=0)[0][0]["loss"] for seed in (1, 1, 2))
    assert one == again != other


def test_defaults() -> None:
    assert SFTConfig(data="x").total_steps(64) == 4
    assert SFTConfig(data="x").lr == 2e-4
