from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from palate.methods.ipo import IPOConfig

Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]


def measured(found: list[dict[str, Any]], name: str) -> list[float]:
    """A held-out number, from before to after."""
    return [row[f"eval_{name}"] for row in found if f"eval_{name}" in row]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_pairs_come_to_be_ranked(fitted: Fitted, lora: bool, seed: int) -> None:
    found, _ = fitted("ipo", lora=lora, seed=seed, beta=0.05)
    before, after = measured(found, "rewards/accuracies")
    assert before == 0.5  # policy = reference prefers neither
    assert after >= 0.75  # by chance, once in a thousand for 40 pairs
    assert measured(found, "loss")[1] < 0.7 * measured(found, "loss")[0]


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_first_loss_is_the_target_squared(fitted: Fitted, beta: float) -> None:
    # At the reference the gap is 0, so Eq. 17 leaves (1 / (2 tau))^2, with tau = beta.
    (row,), _ = fitted("ipo", steps=1, held_out=0, beta=beta)
    assert row["loss"] == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-6)


def test_the_gap_settles_at_its_target(fitted: Fitted) -> None:
    # Beyond 1 / (2 tau) a pair is pulled back, where DPO pushes on without end. The implicit reward margin
    # is tau times the gap, so it settles at a half, whatever tau is.
    ipo, dpo = (
        [row["rewards/margins"] for row in fitted(m, steps=60, held_out=0, beta=0.1, schedule="linear")[0]]
        for m in ("ipo", "dpo")
    )
    # Steps of constant length would keep the gap in motion. The mean of 20 differs by 0.01 from seed to seed.
    assert fmean(ipo[-20:]) == pytest.approx(0.5, abs=0.1)
    assert fmean(dpo[-20:]) > 1.0


def test_mean_takes_the_gap_per_token(fitted: Fitted) -> None:
    (whole,), _ = fitted("ipo", steps=1, held_out=0)
    (mean,), _ = fitted("ipo", steps=1, held_out=0, reduce="mean")
    assert whole["logps/chosen"] < 4 * mean["logps/chosen"]  # completions of about a dozen tokens
    assert mean["loss"] == pytest.approx(whole["loss"])  # at the reference both gaps are 0


@pytest.mark.parametrize("lora", [False, True])
def test_the_seed_decides_the_weights_to_the_last_bit(
    fitted: Fitted, weights: Any, equal: Any, lora: bool
) -> None:
    one, again, other = (weights(fitted("ipo", steps=3, lora=lora, seed=seed)[1]) for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, other)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"reduce": "max"}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        IPOConfig(data="x", **wrong)


def test_the_paper_sums() -> None:
    assert IPOConfig(data="x").reduce == "sum"
