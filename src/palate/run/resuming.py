"""Putting a run back to its last checkpoint."""

from __future__ import annotations

from collections.abc import Callable

from palate.journal import Journal
from palate.run.checkpoint import Checkpoint
from palate.run.following import FollowedMetrics, Place
from palate.run.metrics import MetricsLog
from palate.rundir.writing import writing


def resume(
    place: Place,
    journal: Journal,
    latest: Checkpoint | None,
    metrics: MetricsLog | FollowedMetrics,
    say: Callable[[str], None],
) -> None:
    """Rewind the journal and the metrics to a checkpoint, and write the resume into `config.json`.

    `say` shows changed settings.

    Raises:
        RunError: a file cannot be written.
    """
    rows, version = (latest.position.metrics, latest.learner["version"]) if latest else (0, 0)
    journal.rewind(rows, version if place.changes else None)
    metrics.restore()
    with writing(place.path / "config.json"):
        place.settle()
    if place.changes:
        listed = "; ".join(place.changes)
        say(f"resumed with changed settings, so results will not be bit-identical: {listed}")


def resumed_at(step: int, steps: int, *, finished: bool) -> str:
    """Return the message about a stage that an earlier start of the run began.

    Args:
        step: steps of the run that are done.
        steps: steps of the run up to the end of the stage.
        finished: True if the stage is done.
    """
    return f"{step} of {steps} steps are finished already" if finished else f"resuming after step {step}"
