"""The time that a run takes, by stage of work."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque

SLOW = 5
"""Factor on the usual time per token at which a step is explained."""
FEWEST, MOST = 5, 50
"""Number of earlier steps that define the usual time: at least, and the latest of them."""


class Clock:
    """Wall-clock time of a run and of its current step.

    A stage of work (`sample`, `annotate`, `learn`, `evaluate`) reports after each piece of work; the time
    since the previous report counts for that stage.

    Attributes:
        before: seconds of the run's earlier starts.
    """

    def __init__(self) -> None:
        self.before = 0.0
        self._started = self._step_began = self._last_report = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._amounts: defaultdict[str, int] = defaultdict(int)
        self._usual: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=MOST))
        self._explained = False

    @property
    def seconds(self) -> float:
        """Seconds of the run, summed over all of its starts."""
        return self.before + time.perf_counter() - self._started

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self._seconds.clear()
        self._amounts.clear()
        self._step_began = self._last_report = time.perf_counter()

    def report(self, stage: str, amount: int) -> float:
        """Add the time since the last report, and an amount of work, to a stage.

        Returns:
            The stage's work per second in this step.
        """
        now = time.perf_counter()
        self._seconds[stage] += now - self._last_report
        self._amounts[stage] += amount
        self._last_report = now
        return self._rate(stage)

    def metrics(self) -> dict[str, float]:
        """Return the step's time in seconds, by stage and in total, and the sampled tokens per second."""
        row = {f"time/{stage}": round(seconds, 4) for stage, seconds in self._seconds.items()}
        row["step_time"] = round(time.perf_counter() - self._step_began, 4)
        if self._amounts.get("sample"):  # work in the background has no time of its own
            row["sampling/tokens_per_second"] = round(self._rate("sample"), 1)
        return row

    def explain_slow_step(self) -> str | None:
        """Return an explanation if the step took five times the median time per token; at most one per run.

        Call it once, at the end of each step.
        """
        line = None
        for stage in ("sample", "learn"):
            if not self._amounts[stage]:
                continue
            each, usual = self._seconds[stage] / self._amounts[stage], self._usual[stage]
            if len(usual) >= FEWEST and each > SLOW * statistics.median(usual) and not self._explained:
                line = (
                    f"this step took {each / statistics.median(usual):.0f} times as long per token as usual; "
                    "if another program is using the processor, --threads 1 may be faster until it ends"
                )
            usual.append(each)
        self._explained = self._explained or line is not None
        return line

    def _rate(self, stage: str) -> float:
        return self._amounts[stage] / max(self._seconds[stage], 1e-9)
