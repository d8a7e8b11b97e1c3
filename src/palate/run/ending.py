"""The status in which a run ends."""

from __future__ import annotations

from dataclasses import replace

from palate.errors import BudgetError, NonFiniteError, PalateError
from palate.rundir import Status


def ended(status: Status, error: BaseException | None) -> Status:
    """Return the final status: finished, interrupted (Ctrl-C, a spending limit) or failed with a reason."""
    if error is None:
        return replace(status, state="finished")
    if isinstance(error, KeyboardInterrupt | BudgetError):
        return replace(status, state="interrupted", reason=str(error))
    return replace(status, state="failed", reason=str(error) or type(error).__name__)


def refuses(error: BaseException | None) -> bool:
    """Return True for a mistake of the user: a new run that has done nothing then leaves no directory."""
    return isinstance(error, PalateError) and not isinstance(error, BudgetError | NonFiniteError)


def how_to_resume(step: int, saved: int | None, *, overwrite: bool) -> str:
    """Return the message at the end of an interrupted run.

    Args:
        step: the step at which the run was interrupted.
        saved: the step of the last checkpoint; None without one.
        overwrite: True if the command had `--overwrite`, which must be left out to resume.
    """
    without = ", without --overwrite," if overwrite else ""
    after = "" if saved is None else f" after step {saved}"
    return f"interrupted at step {step}; run the same command again{without} to resume{after}"
