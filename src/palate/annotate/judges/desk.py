"""The desk where a judge's questions arrive: what is known is answered from the ledger, the rest is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from palate.annotate.judges.budget import Budget, Limits
from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.records import Question, Verdict
from palate.errors import AnnotatorError

HOPELESS = 8
"""So many requests that fail one and all are an error, even where earlier ones were answered."""

TOLD = 5
"""Reasons for unusable verdicts that are told; all of them are in the ledger."""


class JudgeModel(Protocol):
    """What answers questions: a model in this process, or a server.

    Attributes:
        name: for people.
        identity: all that an answer depends on besides the question: model, address, parameters.
    """

    name: str

    @property
    def identity(self) -> Mapping[str, Any]:
        """For the keys of verdicts."""

    def ask(self, asked: Mapping[str, Question], desk: Desk) -> None:
        """Answer questions, given by key, and write each verdict to the desk's ledger as soon as it is there.

        A question may be left without a verdict, if the model cannot give one of its kind.

        Raises:
            BudgetError: a limit is reached; the verdicts so far are in the ledger.
        """


class Desk:
    """Answers questions, each of them once.

    Attributes:
        ledger: of verdicts.
        budget: that holds.
        say: tells people something.
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
        """The verdict on each question; None where the model gives none of that kind.

        Raises:
            AnnotatorError: every request failed in transport.
            BudgetError: a limit is reached.
        """
        keys = [question.key(self.model.identity) for question in questions]
        asked = dict(zip(keys, questions, strict=True))
        known = self.ledger.known(list(asked))
        missing = {key: question for key, question in asked.items() if key not in known}
        self.failed = {}
        self._answered = self._answered or bool(known)
        if missing:
            self.model.ask(missing, self)
            fresh = self.ledger.known(list(missing))
            known |= fresh
            self._answered = self._answered or bool(fresh)
            self._require_some(fresh)
        found = [known.get(key) or self.failed.get(key) for key in keys]
        self._tell(found)
        return found

    def note_failure(self, key: str, verdict: Verdict) -> None:
        """Note that a question got no answer at all."""
        self.failed[key] = verdict

    def _require_some(self, fresh: Mapping[str, Verdict]) -> None:
        hopeless = not self._answered or len(self.failed) >= HOPELESS
        if self.failed and not fresh and hopeless:
            *_, last = self.failed.values()
            raise AnnotatorError(
                f"judge {self.model.name}: all of {len(self.failed)} requests failed "
                f"(the last: {last.note}); check the address, the model's name and the key, then run "
                "the same command again: verdicts that had arrived are kept"
            )

    def _tell(self, found: Sequence[Verdict | None]) -> None:
        bad = [v for v in found if v is not None and not v.usable and v.status != "no_logprobs"]
        for status, count in Counter(v.status for v in bad).items():
            if status not in self._told and len(self._told) < TOLD:
                self._told.add(status)
                note = next(v.note for v in bad if v.status == status)
                self.say(
                    f"judge {self.model.name}: {count} of {len(found)} verdicts are unusable "
                    f"({status}: {note})"
                )
