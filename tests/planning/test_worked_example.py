"""The survey article's example: labelling OAIF's data with an API model costs about 30 million won."""

from __future__ import annotations

import pytest

from palate.annotate.judges.prices import Price
from palate.methods import METHODS
from palate.planning.judging import Prices, asked
from palate.spending import Rows

STEPS, PAIRS, WON = 2000, 128, 1400.0
"""Guo et al. 2024: 128 pairs a step; the effect is visible by 2,000 steps. Won per dollar."""


def cost(read: int, written: int, price_in: float, price_out: float) -> tuple[int, float]:
    """Questions and million won for the article's data at these tokens per question and prices."""
    cfg = METHODS["oaif"].configure(
        {"data": "rows.jsonl", "judge": "local:JUDGE", "steps": STEPS, "batch_size": PAIRS}
    )
    spends = METHODS["oaif"].spends
    assert spends is not None
    work = asked(spends(cfg, Rows(100_000, 100_000)).annotations, 0, 0, cfg)
    price = Price(price_in, price_out, "given")
    prices = Prices((price,), None, 1, 1, written, written, twice=False)
    return work.questions, prices.expected(work.questions, read).dollars * WON / 1e6


def test_questions_are_steps_times_pairs_times_two_orders() -> None:
    assert cost(1, 1, 1.0, 1.0)[0] == 2000 * 128 * 2 == 512_000


@pytest.mark.parametrize(
    ("read", "written", "price_in", "price_out", "million_won"),
    [
        (1400, 1, 30.0, 60.0, 30.1),  # GPT-4 at its first price
        (4000, 64, 10.0, 30.0, 30.0),  # GPT-4 Turbo with long texts and a reason
        (1400, 1, 2.5, 10.0, 2.5),
        (1400, 1, 0.15, 0.6, 0.15),
    ],
)
def test_inputs_that_give_the_articles_figure(
    read: int, written: int, price_in: float, price_out: float, million_won: float
) -> None:
    assert cost(read, written, price_in, price_out)[1] == pytest.approx(million_won, rel=0.02)
