"""The errors that Palate raises, as a tree. Every message is one or two sentences that a person can act on.

PalateError (ValueError)
├── ConfigError      a flag, a config key or a value
├── DataError        a file, a row, a prompt
├── ModelError       a model or tokenizer that cannot be used
├── AnnotatorError   a reward function, rule, judge or reward model that failed
├── BudgetError      a spending limit that is reached: the run stops as by Ctrl-C, and can be resumed
└── RunError         a run directory, or training that cannot continue
    ├── NonFiniteError   a loss or gradient that is infinite or NaN
    └── ProcessError     another process of the run has failed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

AGAIN = "run the same command again (without --overwrite)"
"""Advice for errors that leave a run interrupted: this command resumes it, --overwrite would start over."""


class PalateError(ValueError):
    """A mistake that a user can fix. The message states the value, the expectation, the place and the fix."""


class ConfigError(PalateError):
    """A flag, a configuration key or one of their values is wrong."""


class DataError(PalateError):
    """A data file or one of its rows cannot be used."""


class ModelError(PalateError):
    """A model or tokenizer cannot be loaded or does not fit its use."""


class AnnotatorError(PalateError):
    """An annotator failed or returned something other than a reward."""


class BudgetError(PalateError):
    """A spending limit is reached. The run stops as by Ctrl-C: everything is kept, and it can be resumed."""


class RunError(PalateError):
    """A run cannot start, write its files, resume or continue."""


class NonFiniteError(RunError):
    """Losses or gradients are not finite, several times in a row. `records` is the last batch."""

    def __init__(self, message: str, records: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.records = records

    def __reduce__(self) -> tuple[Any, ...]:
        """Include the records in the pickle, so that the exception can cross processes."""
        return type(self), (str(self), self.records)


class ProcessError(RunError):
    """A process of the run ended with an error, died, or does not answer; this process ends with it."""
