from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.prices import price_of
from palate.annotate.judges.records import Amount, Spent
from palate.errors import BudgetError, ConfigError
from palate.testing import Fault, judge_reply
from palate.types import Completion, Prompt


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    verdicts=st.none() | st.integers(0, 60),
    tokens=st.none() | st.integers(0, 4000),
    cost=st.none() | st.floats(0, 0.1),
)
def test_no_limit_is_passed_with_16_in_flight(
    seed: int, verdicts: int | None, tokens: int | None, cost: float | None
) -> None:
    # Requests of random sizes, latencies and ends: a usage below the worst case, a refusal that costs
    # nothing, or a broken connection that counts in full. The true bill is kept apart.
    draw = random.Random(seed)
    budget = Budget(Limits(verdicts, tokens, cost))
    bill = {"verdicts": 0, "tokens": 0, "cost": 0.0}

    async def request(number: int, slots: asyncio.Semaphore) -> bool:
        worst = Amount(draw.randint(1, 300), draw.random() * 0.01)
        async with slots:
            for attempt in range(3):
                try:
                    await budget.reserve(worst, new=attempt == 0)
                except BudgetError:
                    return False
                bill["verdicts"] += attempt == 0
                for _ in range(draw.randint(0, 5)):
                    await asyncio.sleep(0)
                share = draw.choice([0.0, draw.random(), 1.0])
                actual = Amount(int(worst.tokens * share), worst.cost * share)
                bill["tokens"] += actual.tokens
                bill["cost"] += actual.cost
                await budget.settle(worst, actual)
                if draw.random() < 0.7:
                    return True
        return True

    async def all_of_them() -> list[bool]:
        slots = asyncio.Semaphore(16)
        return await asyncio.wait_for(asyncio.gather(*(request(i, slots) for i in range(80))), 30)

    served = asyncio.run(all_of_them())
    assert verdicts is None or bill["verdicts"] <= verdicts
    assert tokens is None or bill["tokens"] <= tokens
    assert cost is None or bill["cost"] <= cost + 1e-9
    assert budget.spent.tokens == bill["tokens"]
    assert budget.spent.cost == pytest.approx(bill["cost"])
    if verdicts is None and tokens is None and cost is None:
        assert all(served)


def test_it_waits_for_what_may_cost_less_than_was_set_aside() -> None:
    budget = Budget(Limits(tokens=100))

    async def go() -> str:
        await budget.reserve(Amount(90), new=True)
        second = asyncio.create_task(budget.reserve(Amount(90), new=True))
        await asyncio.sleep(0.01)
        assert not second.done()
        await budget.settle(Amount(90), Amount(5))
        await asyncio.wait_for(second, 5)
        return "through"

    assert asyncio.run(go()) == "through"


def test_the_limit_of_verdicts_is_reached_after_those_in_flight() -> None:
    budget = Budget(Limits(verdicts=1))

    async def both() -> None:
        await budget.reserve(Amount(100, 0.0), new=True)
        second = asyncio.create_task(budget.reserve(Amount(100, 0.0), new=True))
        await asyncio.sleep(0)
        await budget.settle(Amount(100, 0.0), Amount(30, 0.0))
        await second

    with pytest.raises(BudgetError, match="1 verdicts took 30 tokens"):
        asyncio.run(both())


def test_what_earlier_starts_have_spent_counts() -> None:
    budget = Budget(Limits(verdicts=10, cost=1.0), Spent(verdicts=9, amount=Amount(5000, 0.25)))
    budget.take(Amount(10, 0.1), new=True)
    with pytest.raises(BudgetError, match=r"limit of 10 verdicts is reached: 10 verdicts took 5000 tokens"):
        budget.take(Amount(10, 0.1), new=True)
    budget.take(Amount(10, 0.1), new=False)  # a retry belongs to its verdict
    with pytest.raises(
        BudgetError, match=r"limit of \$1.0 is reached: .*next .* cost \$0.600000.*--max-cost"
    ):
        budget.take(Amount(10, 0.6), new=False)


# ---- With a server ---------------------------------------------------------------------------------


def chaotic(body: dict[str, Any], number: int) -> Any:
    roll = random.Random(number).random()
    if roll < 0.1:
        return Fault(random.Random(number).choice([429, 500, 503]))
    if roll < 0.15:
        return Fault(action="reset_body")
    reply = judge_reply(body, lambda a, b: 0.8)
    if roll < 0.25:
        del reply["usage"]
    return reply


@pytest.mark.parametrize("limits", [Limits(verdicts=25), Limits(tokens=9000), Limits(cost=0.012)])
def test_a_run_of_verdicts_ends_within_its_limit(open_court: Callable[..., Any], limits: Limits) -> None:
    ledger = Ledger()
    court = open_court(
        chaotic, ledger=ledger, limits=limits, delay=lambda n: random.Random(n).random() * 0.02
    )
    pairs = [(Completion("x" * (i + 1), (1,)), Completion("y", (1,))) for i in range(100)]
    with pytest.raises(BudgetError, match="everything is kept"):
        court.judge([Prompt("Q")] * 100, pairs)
    spent = ledger.spent()
    assert spent.verdicts <= (limits.verdicts or 100)
    assert spent.amount.tokens <= (limits.tokens or 1e9)
    assert spent.amount.cost <= (limits.cost or 1e9)
    assert spent.unanswered == 0  # those in flight were waited for
    delivered = sum(court.server.delivered.values())
    assert ledger.counts().get("ok", 0) == delivered > 0  # and every good verdict was kept
    # With more money it resumes where it stopped.
    court.desk.budget = Budget(Limits(), spent)
    assert len(court.judge([Prompt("Q")] * 100, pairs)) == 100
    assert max(court.server.delivered.values()) == 1  # nothing is paid for twice


# ---- Prices ----------------------------------------------------------------------------------------


def test_given_prices_win() -> None:
    price = price_of("gpt-4o-mini", "https://api.openai.com/v1", 3.0, 4.0, needed=True)
    assert (price.source, price.cost(1_000_000, 500_000)) == ("given", 5.0)


def test_a_listed_price() -> None:
    pytest.importorskip("genai_prices")
    price = price_of("gpt-4o-mini", "https://api.openai.com/v1", None, None, needed=True)
    assert price.source.startswith("genai-prices ")
    assert 0 < price.per_million_in < price.per_million_out


def test_an_unknown_price() -> None:
    assert price_of("mine", "http://localhost/v1", None, None, needed=False).source == "unknown"
    with pytest.raises(ConfigError, match="price of 'mine' at http://localhost/v1 is unknown, so --max-cost"):
        price_of("mine", "http://localhost/v1", None, None, needed=True)


def test_one_price_without_the_other() -> None:
    with pytest.raises(ConfigError, match="go together"):
        price_of("m", "http://localhost/v1", 1.0, None, needed=False)
