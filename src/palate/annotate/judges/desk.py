"""The desk for a judge's questions: it answers known ones from the ledger and asks the model the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.records import Question, Verdict
from palate.errors import AnnotatorError

HOPELESS = 8
"""Requests from which a call with only failures is an error, even if earlier calls were answered."""

TOLD = 5
"""The most reasons for unusable verdicts to show; all of them are in the ledger."""


class JudgeModel(Protocol):
    """A model that answers questions, in this process or on a server.

    Attributes:
        name: the name in messages.
        identity: everything besides the question that an answer depends on: model, address, parameters.
    """

    name: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """Return the identity, for the keys of verdicts."""

    def ask(self, questions: Mapping[str, Question], desk: Desk) -> None:
        """Answer questions, given by key, and write each verdict to the desk's ledger as soon as it arrives.

        A question gets no verdict if the model cannot give one of its kind.

        Raises:
            BudgetError: a limit is reached; the verdicts so far are in the ledger.
        """


class Desk:
    """Answers questions, each of them once.

    Attributes:
        ledger: the verdicts.
        budget: the spending limits.
        say: shows a message to the user.
    """

    def __init__(
        self,
        model: JudgeModel,
        ledger: Ledger | None = None,
        budget: Budget | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model = model
        self.ledger = ledger or Ledger()
        self.budget = budget or Budget(Limits(), self.ledger.spent())
        self.say = say
        self.failed: dict[str, Verdict] = {}
        self._answered = False
        self._told: set[str] = set()

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict | None]:
        """Return the verdict on each question; None if the model gives none of that kind.

        Raises:
            AnnotatorError: every request failed in transport.
            BudgetError: a limit is reached.
        """
        keys = [question.key(self.model.identity) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        known = self.ledger.known(list(by_key))
        missing = {key: question for key, question in by_key.items() if key not in known}
        self.failed = {}
        self._answered = self._answered or bool(known)
        if missing:
            self.model.ask(missing, self)
            fresh = self.ledger.known(list(missing))
            known |= fresh
            self._answered = self._answered or bool(fresh)
            self._require_some(fresh)
        verdicts = [known.get(key) or self.failed.get(key) for key in keys]
        self._tell(verdicts)
        return verdicts

    def note_failure(self, key: str, verdict: Verdict) -> None:
        """Record that a question got no answer."""
        self.failed[key] = verdict

    def _require_some(self, fresh: Mapping[str, Verdict]) -> None:
        hopeless = not self._answered or len(self.failed) >= HOPELESS
        if self.failed and not fresh and hopeless:
            *_, last = self.failed.values()
            raise AnnotatorError(
                f"judge {self.model.name}: all of {len(self.failed)} requests failed "
                f"(the last: {last.note}); check the address, the model's name and the key, then run "
                "the same command again: verdicts that have arrived are kept"
            )

    def _tell(self, verdicts: Sequence[Verdict | None]) -> None:
        bad = [v for v in verdicts if v is not None and not v.usable and v.status != "no_logprobs"]
        for status, count in Counter(v.status for v in bad).items():
            if status not in self._told and len(self._told) < TOLD:
                self._told.add(status)
                note = next(v.note for v in bad if v.status == status)
                self.say(
                    f"judge {self.model.name}: {count} of {len(verdicts)} verdicts are unusable "
                    f"({status}: {note})"
                )
