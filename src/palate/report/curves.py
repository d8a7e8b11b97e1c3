"""The form of a panel in a report: its curves and their lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from palate.metrics import of_samples
from palate.rundir import RunRecord
from palate.rundir.record import Points

TRAINING, HELD_OUT = "training", "held out"
"""Labels of curves from training steps and from held-out measurements."""


@dataclass(frozen=True)
class Line:
    """A curve of one run.

    Attributes:
        points: steps and values.
        band: the distances from the values down and up to the edges of the band, at the same steps; None
            for no band.
        label: the text at the end of the line.
        style: the index of its colour, dash and marker.
        measured: True for held-out measurements. They have few points, so each one gets a marker.
        once: True if the samples were drawn once for all steps, so that the line is a single value.
    """

    points: Points
    label: str = ""
    style: int = 0
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    measured: bool = False
    once: bool = False


@dataclass(frozen=True)
class Curve:
    """The source of a panel's line: its metric, label and band."""

    metric: str
    label: str = ""
    std: str = ""
    """Metric of a standard deviation, for a band."""
    bounds: tuple[str, str] | None = None
    """Metrics of an interval, for a band."""
    of: Callable[[RunRecord], Points] | None = None
    """A function that computes the points from several metrics, instead of reading `metric`."""

    @property
    def measured(self) -> bool:
        """True for a held-out measurement."""
        return self.metric.startswith("eval_")

    @property
    def band_note(self) -> str:
        """A sentence that explains the band."""
        return "The band shows " + (
            "one standard deviation of the samples." if self.std else "the 95 % interval."
        )

    def read(self, run: RunRecord) -> Line:
        """Return the line of a run; it has no points if the run lacks the metric."""
        points = run.curve(self.metric) if self.of is None else self.of(run)
        once = not run.fresh and len(points[0]) == 1 and of_samples(self.metric)
        band = self._band(run, points)
        return Line(points, self.label, band=band, measured=self.measured, once=once)

    def _band(self, run: RunRecord, points: Points) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        low, high = self.bounds or (self.std, self.std)
        lows, highs = (dict(zip(*run.curve(name), strict=True)) for name in (low, high))
        if not lows or not highs:
            return None
        steps, values = points
        if self.bounds is not None:
            return (
                tuple(value - lows.get(step, value) for step, value in zip(steps, values, strict=True)),
                tuple(highs.get(step, value) - value for step, value in zip(steps, values, strict=True)),
            )
        spread = tuple(lows.get(step, 0.0) for step in steps)
        return spread, spread


@dataclass(frozen=True)
class Panel:
    """One plot: its curves, title, caption and guide."""

    key: str
    title: str
    unit: str
    caption: str
    curves: tuple[Curve, ...]
    guide: float | None = None
    """A value to compare with, drawn as a horizontal line."""
    rate: bool = False
    """True if the values are fractions; they are shown in per cent."""
    lines: tuple[Line, ...] = field(default=(), compare=False)
    """The lines to draw, after the runs have been read."""
