"""Spending limits. The worst case is reserved before a request is sent, so a limit is never exceeded."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from palate.annotate.judges.records import Amount, Spent
from palate.errors import BudgetError


@dataclass(frozen=True)
class Limits:
    """Limits on judging over all starts of a run; None for no limit.

    Attributes:
        verdicts: questions in one order; retries of a question are included.
        tokens: read and written by the judge.
        cost: dollars.
    """

    verdicts: int | None = None
    tokens: int | None = None
    cost: float | None = None


class Budget:
    """The amounts spent and reserved, checked against the limits.

    Attributes:
        spent: the settled amounts of the whole run.

    Args:
        limits: the spending limits.
        spent: the amounts of earlier starts of the run.
    """

    def __init__(self, limits: Limits, spent: Spent | None = None) -> None:
        self.limits = limits
        earlier = spent or Spent()
        self.spent, self.verdicts = earlier.amount, earlier.verdicts
        self._reserved = Amount()
        self._in_flight = 0
        self._settled = asyncio.Condition()

    async def reserve(self, worst: Amount, *, new: bool) -> None:
        """Reserve the worst case of a request as soon as the limits allow it.

        It waits while requests in flight may still cost less than their reserves; at a limit, it waits for
        them too, so that the error names all that was spent.

        Args:
            worst: the highest possible cost of the request.
            new: the request begins a verdict and is not a retry.

        Raises:
            BudgetError: a limit is reached, and no request in flight could free some of it.
        """
        async with self._settled:
            while (over := self._over(worst, new)) is not None:
                if self._in_flight == 0:
                    raise BudgetError(self.reached(over, worst))
                await self._settled.wait()
            self.take(worst, new=new)

    def take(self, worst: Amount, *, new: bool) -> None:
        """Reserve an amount without waiting.

        Raises:
            BudgetError: a limit is reached.
        """
        if (over := self._over(worst, new)) is not None:
            raise BudgetError(self.reached(over, worst))
        self._reserved += worst
        self._in_flight += 1
        self.verdicts += new

    async def settle(self, worst: Amount, actual: Amount) -> None:
        """Replace a reserve by the actual cost."""
        async with self._settled:
            self.settle_now(worst, actual)
            self._settled.notify_all()

    def settle_now(self, worst: Amount, actual: Amount) -> None:
        """Replace a reserve by the actual cost, without waking other requests."""
        self._reserved -= worst
        self._in_flight -= 1
        if self._in_flight == 0:
            self._reserved = Amount()  # removes rounding errors
        self.spent += actual

    def reached(self, over: str, worst: Amount) -> str:
        """Return one sentence that names the limit that is reached and the amount spent."""
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
