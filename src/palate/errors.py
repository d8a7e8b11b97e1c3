"""What can go wrong, as a tree. Every message is one sentence or two for a person to act on.

PalateError (ValueError)
├── ConfigError      a flag, a config key or a value
├── DataError        a file, a row, a prompt
├── ModelError       a model or tokenizer that cannot be used
├── AnnotatorError   a reward function, rule, judge or reward model that failed
├── BudgetError      a spending limit that is reached: the run stops as by Ctrl-C, and can be resumed
└── RunError         a run directory, or training that cannot go on
    └── NonFiniteError   a loss or gradient that is infinite or no number
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AGAIN = "run the same command again (without --overwrite)"
"""The way out of what leaves a run stopped: with that flag, the same command would begin anew."""


class PalateError(ValueError):
    """A mistake that a user can mend: the text says what was got, what was expected, where, what to do."""


class ConfigError(PalateError):
    """A flag, a configuration key or one of their values is wrong."""


class DataError(PalateError):
    """A data file or one of its rows cannot be used."""


class ModelError(PalateError):
    """A model or tokenizer cannot be loaded or does not fit its use."""


class AnnotatorError(PalateError):
    """An annotator failed or gave something that is no reward."""


class BudgetError(PalateError):
    """A spending limit is reached. The run stops as by Ctrl-C: everything is kept, and it can be resumed."""


class RunError(PalateError):
    """A run cannot start, write or go on."""


class NonFiniteError(RunError):
    """Losses or gradients are not finite, several times in a row. `records` are the last batch."""

    def __init__(self, message: str, records: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.records = records

    def __reduce__(self) -> tuple[Any, ...]:
        """With the records: an exception must survive pickling to cross processes."""
        return type(self), (str(self), self.records)
