from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.desk import Desk
from palate.annotate.judges.judging import Bench, PairwiseJudge
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.prices import Price
from palate.annotate.judges.server import ServerModel, ServerOptions
from palate.annotate.judges.template import Template
from palate.testing import Answer, FaultyServer

PRICE = Price(1.0, 2.0, "given")


class Court:
    """A pairwise judge on a faulty server, with its ledger."""

    def __init__(
        self, server: FaultyServer, ledger: Ledger, *, limits: Limits, key: str, options: dict[str, Any]
    ):
        self.server, self.ledger, self.said = server, ledger, []  # type: ignore[var-annotated]
        fixed = {"backoff": 0.005, "timeout": 30.0, "max_wait": 1.0}
        model_options = ServerOptions(**{**fixed, **options})
        self.model = ServerModel("m", server.url, key=key, price=PRICE, options=model_options)
        self.desk = Desk(self.model, ledger, Budget(limits, ledger.spent()), self.said.append)
        self.bench = Bench(self.desk, Template.load("pairwise"))
        self.judge = PairwiseJudge(self.bench)


@pytest.fixture
def open_court() -> Iterator[Callable[..., Court]]:
    """Opens a judge over a server that answers as told."""
    with ExitStack() as stack:

        def opened(
            answer: Answer,
            *,
            ledger: Ledger | None = None,
            limits: Limits | None = None,
            key: str = "sk-secret-0123456789",
            delay: Callable[[int], float] = lambda number: 0.0,
            **options: Any,
        ) -> Court:
            server = stack.enter_context(FaultyServer(answer, delay=delay))
            court = Court(server, ledger or Ledger(), limits=limits or Limits(), key=key, options=options)
            stack.callback(court.model.close)
            return court

        yield opened
