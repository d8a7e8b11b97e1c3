from __future__ import annotations

import math

import numpy as np
import pytest

from palate.effects import NO_SEEDS, Part, Pooled, contrast, differences, holm, pooled_variance, rate_of

METHODS, PROMPTS = 5, 60


def tables(
    gaps: list[float], seeds: int, *, draw: int, seed_sd: float = 0.15, prompt_sd: float = 0.5
) -> dict[str, np.ndarray]:
    """Rewards of methods with true means `gaps`; seeds, prompts and the rest vary."""
    random = np.random.default_rng(draw)
    shared = random.normal(0, prompt_sd, PROMPTS)
    return {
        f"m{i}": gap
        + random.normal(0, seed_sd, (seeds, 1))
        + shared
        + random.normal(0, 0.2, PROMPTS)
        + random.normal(0, 0.4, (seeds, PROMPTS))
        for i, gap in enumerate(gaps)
    }


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("methods", [2, 3, METHODS])
def test_planted_nulls_are_not_found(methods: int, seeds: int) -> None:
    """The share of comparisons with any false finding stays near 5 %."""
    wrong = sum(any(d.clear for d in differences(tables([0.0] * methods, seeds, draw=i))) for i in range(300))
    assert wrong <= 27  # 300 x 5 % + 3.2 standard errors


@pytest.mark.parametrize("seeds", [2, 3])
def test_a_model_that_no_seed_changes_adds_no_variance_of_seeds(seeds: int) -> None:
    wrong = found = 0
    for i in range(200):
        base = {"base": np.random.default_rng(10_000 + i).normal(0, 0.5, (1, PROMPTS))}
        for gap in (0.0, 0.6):
            made = differences(base | tables([gap] * 3, seeds, draw=i), fixed={"base"})
            if gap:
                found += sum(d.p < 0.05 for d in made if d.one == "base")
            else:
                wrong += any(d.clear for d in made)
    assert wrong <= 21  # 200 x 5 % + 3.5 standard errors
    assert found >= 0.85 * 600


def test_a_method_without_any_number_leaves_the_others_alone() -> None:
    parts = tables([0.0, 5.0], 3, draw=1)
    alone = differences(parts)[0]
    parts["none"] = np.full((3, PROMPTS), math.nan)
    made = {(d.one, d.other): d for d in differences(parts)}
    assert made["m0", "m1"].mean == alone.mean
    assert (made["m0", "m1"].low, made["m0", "m1"].p) == (alone.low, alone.p)
    assert math.isnan(made["m0", "none"].mean)
    assert not made["m0", "none"].clear


@pytest.mark.parametrize(("seeds", "power"), [(2, 0.65), (3, 0.9)])
def test_planted_differences_are_found(seeds: int, power: float) -> None:
    """With two seeds each, little is known of their variance."""
    gaps = [0.0, 0.0, 0.0, 0.0, 1.0]
    found = 0
    for i in range(60):
        found += sum(d.clear for d in differences(tables(gaps, seeds, draw=i)) if "m4" in (d.one, d.other))
    assert found >= power * 60 * 4


def test_without_the_seeds_one_would_be_fooled() -> None:
    """Prompts alone find differences between seeds of one method, which are no differences of methods."""
    fooled = sum(
        any(
            d.clear
            for d in differences({name: table[:1] for name, table in tables([0.0] * 3, 2, draw=i).items()})
        )
        for i in range(100)
    )
    assert fooled > 15


def test_the_interval_covers_the_difference() -> None:
    covered = [
        d.low <= -0.3 <= d.high
        for i in range(300)
        for d in differences(tables([0.0, 0.3, 0.0], 3, draw=i))
        if (d.one, d.other) == ("m0", "m1")
    ]
    assert 0.92 <= np.mean(covered) <= 0.99


def test_methods_may_have_different_numbers_of_seeds_and_gaps_in_the_rewards() -> None:
    parts = tables([0.0, 1.0], 3, draw=1)
    parts["m0"] = parts["m0"][:1].copy()
    parts["m0"][0, 3] = math.nan
    (difference,) = differences(parts)
    assert difference.mean == pytest.approx(-1, abs=0.5)
    assert difference.low < difference.mean < difference.high
    assert difference.seeds


def test_one_seed_each_says_so() -> None:
    parts = {name: table[:1] for name, table in tables([0.0, 1.0], 2, draw=1).items()}
    assert pooled_variance(list(parts.values())) == NO_SEEDS
    assert not differences(parts)[0].seeds


def test_without_noise_the_error_is_that_of_the_prompts() -> None:
    table = np.tile(np.array([0.0, 1.0, 0.0, 1.0, 1.0]), (3, 1))
    estimate = contrast(Part(1.0, table), pooled=Pooled(0.0, 4))
    assert estimate.error == pytest.approx(math.sqrt(np.var(table[0], ddof=1) / 5))
    assert estimate.freedom == pytest.approx(4)


def test_a_rate_has_a_wider_interval_with_seeds_that_differ() -> None:
    random = np.random.default_rng(0)
    alike = (random.random((3, 100)) < 0.7).astype(float)
    apart = np.stack([(random.random(100) < p).astype(float) for p in (0.5, 0.7, 0.9)])
    wide, narrow = (rate_of(t) for t in (apart, alike))
    assert wide[2] - wide[1] > narrow[2] - narrow[1]
    assert narrow[1] < narrow[0] < narrow[2]


def test_rates_at_the_edge() -> None:
    assert rate_of(np.ones((2, 20)))[0::2] == (1.0, 1.0)
    assert math.isnan(rate_of(np.full((1, 3), math.nan))[0])


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_few_prompts_with_the_same_difference_prove_nothing() -> None:
    few, many = ({"a": np.ones((1, n)), "b": np.zeros((1, n))} for n in (3, 12))
    (difference,) = differences(few)
    assert difference.p == pytest.approx(2 * 0.5**3)
    assert not difference.clear
    assert differences(many)[0].clear
