from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from palate.methods.dpo import DPOConfig

Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]


def measured(found: list[dict[str, Any]], name: str) -> list[float]:
    """A held-out number, from before to after."""
    return [row[f"eval_{name}"] for row in found if f"eval_{name}" in row]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_pairs_come_to_be_ranked(fitted: Fitted, lora: bool, seed: int) -> None:
    found, _ = fitted("dpo", lora=lora, seed=seed)
    before, after = measured(found, "rewards/accuracies")
    assert before == 0.5  # policy = reference prefers neither
    assert after >= 0.75  # by chance, once in a thousand for 40 pairs
    assert measured(found, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert measured(found, "loss")[1] < 0.6
    assert measured(found, "rewards/margins")[1] > 0.2


def test_the_first_step_starts_at_the_reference(fitted: Fitted) -> None:
    (row, *_), _ = fitted("dpo", steps=1, held_out=0)
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (row["rewards/chosen"], row["rewards/margins"], row["rewards/accuracies"]) == (0.0, 0.0, 0.5)


def test_beta_scales_the_implicit_reward(fitted: Fitted) -> None:
    # A first step's gradient is beta/2 times the margin's, and clipped to norm 1 here either way: the same
    # step, after which the rewards differ by the factor of beta.
    (_, one), _ = fitted("dpo", steps=2, held_out=0, beta=0.1, max_grad_norm=1e-3)
    (_, ten), _ = fitted("dpo", steps=2, held_out=0, beta=1.0, max_grad_norm=1e-3)
    assert ten["rewards/margins"] == pytest.approx(10 * one["rewards/margins"], rel=1e-2)
    assert one["rewards/margins"] > 0


def test_label_smoothing_keeps_the_margin_finite(fitted: Fitted) -> None:
    # cDPO's optimum for a share e of flipped labels: margin = log((1 - e) / e), here log 3.
    free, smooth = (
        measured(fitted("dpo", label_smoothing=e, steps=40)[0], "rewards/margins")[-1] for e in (0.0, 0.25)
    )
    assert smooth < math.log(3) + 0.3 < free


def test_epochs_and_measurements(fitted: Fitted) -> None:
    found, _ = fitted("dpo", pairs=20, batch_size=8, epochs=1.0, steps=None, eval_every=2)
    steps = [row for row in found if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]  # 20 pairs in batches of 8: the last runs on
    assert [row["epoch"] for row in steps] == [0.4, 0.8, 1.2]
    assert [row["step"] for row in found if "eval_loss" in row] == [0, 2, 3]


def test_half_an_epoch_and_several(fitted: Fitted) -> None:
    cfg = DPOConfig(data="x", batch_size=8)
    assert cfg.total_steps(20) == 3
    assert cfg.model_copy(update={"epochs": 0.5}).total_steps(64) == 4
    assert cfg.model_copy(update={"epochs": 3.0}).total_steps(64) == 24
    assert cfg.model_copy(update={"epochs": 0.01}).total_steps(1) == 1
    assert cfg.model_copy(update={"steps": 7}).total_steps(64) == 7


def test_without_held_out_pairs_nothing_is_measured(fitted: Fitted) -> None:
    found, _ = fitted("dpo", steps=1, held_out=0)
    assert len(found) == 1
    assert not [name for name in found[0] if name.startswith("eval_")]


def test_no_kl_is_claimed_for_texts_of_others(fitted: Fitted) -> None:
    # The mean log-ratio is a KL on the policy's own samples only.
    found, _ = fitted("dpo", steps=1)
    assert not [name for row in found for name in row if "kl" in name]


@pytest.mark.parametrize("lora", [False, True])
def test_the_seed_decides_the_weights_to_the_last_bit(
    fitted: Fitted, weights: Any, equal: Any, lora: bool
) -> None:
    one, again, other = (weights(fitted("dpo", steps=3, lora=lora, seed=seed)[1]) for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, other)


def test_a_policy_that_is_measured_does_not_learn_from_it(fitted: Fitted, weights: Any, equal: Any) -> None:
    one, other = (weights(fitted("dpo", steps=3, held_out=n, eval_every=1)[1]) for n in (0, 8))
    assert equal(one, other)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": -1}, {"label_smoothing": 0.5}, {"epochs": 0}])
def test_numbers_out_of_range(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DPOConfig(data="x", **wrong)  # type: ignore[arg-type]


def test_defaults_are_the_papers() -> None:
    cfg = DPOConfig(data="x")
    assert (cfg.beta, cfg.label_smoothing) == (0.1, 0.0)
