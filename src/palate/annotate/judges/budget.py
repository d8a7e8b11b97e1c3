"""Spending limits. The worst case is reserved before a request goes out, so a limit is never passed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from palate.annotate.judges.records import Amount, Spent
from palate.errors import BudgetError


@dataclass(frozen=True)
class Limits:
    """The most that judging may take over a run's whole life; None for no limit.

    Attributes:
        verdicts: questions in one order; retries of a question are included.
        tokens: read and written by the judge.
        cost: dollars.
    """

    verdicts: int | None = None
    tokens: int | None = None
    cost: float | None = None


class Budget:
    """What is spent, what is reserved, and whether there is room for more.

    Attributes:
        spent: settled amounts of the whole run.

    Args:
        limits: that hold.
        spent: by earlier starts of the run.
    """

    def __init__(self, limits: Limits, spent: Spent | None = None) -> None:
        self.limits = limits
        earlier = spent or Spent()
        self.spent, self.verdicts = earlier.amount, earlier.verdicts
        self._reserved = Amount()
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def reserve(self, worst: Amount, *, new: bool) -> None:
        """Set the worst case of a request aside, once there is room for it.

        While requests are in flight that may cost less than was set aside for them, it waits for them.

        Args:
            worst: what the request can cost at most.
            new: it begins a verdict, rather than retries one.

        Raises:
            BudgetError: there is no room, and nothing in flight that could make some.
        """
        async with self._settled:
            while (over := self._over(worst, new)) is not None:
                if self._in_flight == 0 or over == "verdicts":
                    raise BudgetError(self.told(over, worst))
                await self._settled.wait()
            self.take(worst, new=new)

    def take(self, worst: Amount, *, new: bool) -> None:
        """Set an amount aside without waiting.

        Raises:
            BudgetError: there is no room for it.
        """
        if (over := self._over(worst, new)) is not None:
            raise BudgetError(self.told(over, worst))
        self._reserved += worst
        self._in_flight += 1
        self.verdicts += new

    async def settle(self, worst: Amount, actual: Amount) -> None:
        """Replace what was reserved by what it has cost."""
        async with self._settled:
            self.settle_now(worst, actual)
            self._settled.notify_all()

    def settle_now(self, worst: Amount, actual: Amount) -> None:
        """The same, where nobody waits."""
        self._reserved -= worst
        self._in_flight -= 1
        if self._in_flight == 0:
            self._reserved = Amount()  # without what rounding has left
        self.spent += actual

    def told(self, over: str, worst: Amount) -> str:
        """Which limit is reached, and what was spent, in one sentence."""
        flags = {"verdicts": "max-verdicts", "tokens": "max-judge-tokens", "cost": "max-cost"}
        values = {
            "verdicts": f"{self.limits.verdicts} verdicts",
            "tokens": f"{self.limits.tokens} tokens",
            "cost": f"${self.limits.cost}",
        }
        needs = {"verdicts": "", "tokens": f", and the next request may take {worst.tokens} tokens",
                 "cost": f", and the next request may cost ${worst.cost:.6f}"}  # fmt: skip
        spent = f"{self.verdicts} verdicts took {self.spent.tokens} tokens and ${self.spent.cost:.4f}"
        return (
            f"the judge's limit of {values[over]} is reached: {spent}{needs[over]}; everything is kept. "
            f"To resume, run the same command again with a higher --{flags[over]}"
        )

    def _over(self, worst: Amount, new: bool) -> str | None:
        after = self.spent + self._reserved + worst
        if new and self.limits.verdicts is not None and self.verdicts + 1 > self.limits.verdicts:
            return "verdicts"
        if self.limits.tokens is not None and after.tokens > self.limits.tokens:
            return "tokens"
        if self.limits.cost is not None and after.cost > self.limits.cost * (1 + 1e-12):
            return "cost"
        return None
