"""Which curves a report draws, and the numbers of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from palate.report.read import Points, RunRecord

MOST_OTHERS = 36
"""Curves of metrics that no panel below names; a method may log any."""

PART = "objective/scores/"
"""What the names of a reward's parts begin with."""

TRAINING, HELD_OUT = "training", "held out"
"""Labels of what is logged of a step's work, and of what is measured."""

STAGES = {"sample": "sampling", "annotate": "scoring", "learn": "learning", "evaluate": "measuring"}
"""Stages of a run that metrics give the time of, as `time/sample`, and what they are called."""


@dataclass(frozen=True)
class Line:
    """A curve of one run.

    Attributes:
        points: steps and values.
        band: how far up and down the band around it reaches, at the same steps; none if empty.
        label: what stands at its end.
        style: which colour, dash and marker.
        measured: held out, so few points, each of which is drawn.
    """

    points: Points
    label: str = ""
    style: int = 0
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    measured: bool = False


@dataclass(frozen=True)
class Curve:
    """How a line of a panel is read from a run: its metric, its label, its band."""

    metric: str
    label: str = ""
    std: str = ""
    """Metric of a standard deviation, for a band."""
    bounds: tuple[str, str] | None = None
    """Metrics of an interval, for a band."""
    of: Callable[[RunRecord], Points] | None = None
    """Instead of the metric: a number made of several."""

    @property
    def measured(self) -> bool:
        """Whether it is a held-out measurement."""
        return self.metric.startswith("eval_")

    @property
    def band_note(self) -> str:
        """What the band is."""
        return "The band is " + (
            "one standard deviation of the samples." if self.std else "the 95 % interval."
        )

    def read(self, run: RunRecord) -> Line:
        """The line of a run; without points if the run has not the metric."""
        points = run.curve(self.metric) if self.of is None else self.of(run)
        return Line(points, self.label, measured=self.measured, band=self._band(run, points))

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
    """One plot: its curves, what it shows, and the value that a reader compares with."""

    key: str
    title: str
    unit: str
    caption: str
    curves: tuple[Curve, ...]
    guide: float | None = None
    """A value to compare with, drawn as a line across."""
    rate: bool = False
    """Fractions, shown as per cent."""
    lines: tuple[Line, ...] = field(default=(), compare=False)
    """What is drawn, once runs have been read."""


def _dropped(reason: str) -> Callable[[RunRecord], Points]:
    """Share of the groups of a step that gave no pair for a reason."""

    def share(run: RunRecord) -> Points:
        found = []
        for row in run.rows:
            dropped, kept = row.get("pairs/dropped", math.nan), row.get("pairs/kept", math.nan)
            count = row.get(f"pairs/dropped_{reason}", math.nan)
            if math.isfinite(dropped + kept + count) and dropped + kept > 0:
                found.append((row["step"], count / (dropped + kept)))
        return tuple(step for step, _ in found), tuple(value for _, value in found)

    return share


PANELS = (
    Panel(
        "reward",
        "Reward",
        "reward",
        "What the annotator gives to fresh samples.",
        (
            Curve("objective/scores", TRAINING, std="objective/scores_std"),
            Curve("eval_objective/scores", HELD_OUT),
        ),
    ),
    Panel(
        "win_rate",
        "Win rate over the start",
        "share of prompts",
        "Held-out prompts on which the model beats the one that it was.",
        (Curve("eval_win_rate", bounds=("eval_win_rate_low", "eval_win_rate_high")),),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "spread",
        "Best minus worst",
        "reward",
        "Gap of reward within a group of completions. Where it is gone, there is nothing left to tell apart.",
        (Curve("objective/scores_margin"),),
    ),
    Panel(
        "kl",
        "KL to the start",
        "nats per completion",
        "How far the model has moved. It begins at 0 and should grow slowly.",
        (Curve("objective/kl", TRAINING), Curve("eval_objective/kl", HELD_OUT)),
        guide=0.0,
    ),
    Panel(
        "accuracy",
        "Accuracy",
        "share of pairs",
        "Pairs that the implicit reward ranks rightly. A coin gets half.",
        (Curve("rewards/accuracies", TRAINING), Curve("eval_rewards/accuracies", HELD_OUT)),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "margin",
        "Margin",
        "implicit reward",
        "Implicit reward of chosen minus that of rejected.",
        (Curve("rewards/margins", TRAINING), Curve("eval_rewards/margins", HELD_OUT)),
        guide=0.0,
    ),
    Panel(
        "implicit",
        "Implicit rewards",
        "implicit reward",
        "Beta times how much likelier than at the start a text has become.",
        (Curve("rewards/chosen", "chosen"), Curve("rewards/rejected", "rejected")),
        guide=0.0,
    ),
    Panel(
        "logps",
        "Log-probabilities",
        "nats",
        "Of chosen and rejected completions, pairs as they come.",
        (Curve("logps/chosen", "chosen"), Curve("logps/rejected", "rejected")),
    ),
    Panel(
        "eval_logps",
        "Log-probabilities, held out",
        "nats",
        "The same pairs each time, so that a fall is a fall.",
        (Curve("eval_logps/chosen", "chosen"), Curve("eval_logps/rejected", "rejected")),
    ),
    Panel(
        "shift",
        "Distribution shift",
        "nats per token",
        "How likely the model finds what it is trained on, and what it writes itself. The further apart the "
        "two, the less the training text is like its own.",
        (
            Curve("logps/training", "trained on"),
            Curve("logps/fresh", "its own"),
            Curve("eval_logps/training", "trained on, held out"),
        ),
    ),
    Panel(
        "length",
        "Length",
        "tokens",
        "Mean length of fresh completions, and of those that came to an end.",
        (Curve("completions/mean_length", "all"), Curve("completions/mean_terminated_length", "ended")),
    ),
    Panel(
        "ended",
        "Ended and cut",
        "share of completions",
        "Ended with an end token; cut at max_new_tokens.",
        (Curve("val/contain_eos_token", "ended"), Curve("completions/clipped_ratio", "cut")),
        rate=True,
    ),
    Panel(
        "dead",
        "Dead pairs",
        "share of groups",
        "Groups that gave no pair: the rewards tie, the texts are the same, or no reward is usable.",
        tuple(
            Curve(f"pairs/dropped_{why}", label, of=_dropped(why))
            for why, label in (("tie", "ties"), ("identical", "identical"), ("unusable", "unusable"))
        ),
        rate=True,
    ),
    Panel(
        "loss",
        "Loss",
        "loss",
        "What the optimizer sees. Falling is not yet a better model.",
        (Curve("loss", TRAINING), Curve("eval_loss", HELD_OUT)),
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "norm",
        "Before it is scaled down to max_grad_norm. Peaks are odd batches.",
        (Curve("grad_norm"),),
    ),
    Panel(
        "entropy",
        "Entropy",
        "nats per token",
        "How undecided the model is. Near 0 it says the same each time.",
        (Curve("entropy", TRAINING), Curve("eval_entropy", HELD_OUT)),
    ),
    Panel(
        "gap",
        "Sampler against learner",
        "nats per token",
        "Difference of their log-probabilities of the same tokens: rounding, if all is well.",
        (
            Curve("sampling/sampling_logp_difference/mean", "mean"),
            Curve("sampling/sampling_logp_difference/max", "largest"),
        ),
    ),
    Panel(
        "speed",
        "Sampling speed",
        "tokens per second",
        "Fresh tokens per second of sampling.",
        (Curve("sampling/tokens_per_second"),),
    ),
    Panel("step_time", "Time of a step", "seconds", "Wall-clock time.", (Curve("step_time"),)),
)
"""Those of which a run has numbers are drawn, in this order."""

PLAIN = {"step", "epoch", "beta", "num_tokens"} | {f"time/{stage}" for stage in STAGES}
"""Metrics that are not worth a curve, or have a plot of another kind."""


def panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """The panels that the runs have numbers for, with their lines.

    Of several runs, each panel has one line a run: a panel of several curves becomes several panels.
    """
    first, *rest = PANELS
    return [drawn for panel in (first, _parts(runs), *rest) for drawn in _drawn(panel, runs)]


def other_panels(runs: Sequence[RunRecord]) -> list[Panel]:
    """A panel for every further metric that changes in a run."""
    curves = [curve for panel in (_parts(runs), *PANELS) for curve in panel.curves]
    named = {name for curve in curves for name in (curve.metric, curve.std, *(curve.bounds or ()))}
    rest = [n for n in _names(runs) if n not in named | PLAIN and any(_changes(run, n) for run in runs)]
    shown = (Panel(f"other-{i}", name, "", "", (Curve(name),)) for i, name in enumerate(rest[:MOST_OTHERS]))
    return [drawn for panel in shown for drawn in _drawn(panel, runs)]


def _parts(runs: Sequence[RunRecord]) -> Panel:
    """Rewards that are weighed and added up, where there are several; methods log them by their own names."""
    names = [name for name in _names(runs) if name.startswith(PART)]
    curves = tuple(Curve(name, name.removeprefix(PART)) for name in names)
    return Panel(
        "parts", "Parts of the reward", "reward", "Each reward before it is weighed and added.", curves
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Every metric of the runs, in the order in which they came."""
    rows = (row for run in runs for row in (*run.rows, *run.measurements))
    return list(dict.fromkeys(name for row in rows for name in row))


def _changes(run: RunRecord, name: str) -> bool:
    return len(set(run.curve(name)[1])) > 1


def _drawn(panel: Panel, runs: Sequence[RunRecord]) -> Iterator[Panel]:
    if len(runs) == 1:
        lines = [replace(curve.read(runs[0]), style=i) for i, curve in enumerate(panel.curves)]
        kept = [line for line in lines if _worth(panel, line)]
        if len(kept) == 1 and kept[0].label == TRAINING:
            kept = [replace(kept[0], label="")]  # there is nothing to tell it from
        notes = [curve.band_note for curve, line in zip(panel.curves, lines, strict=True) if line.band]
        yield from _with(replace(panel, caption=" ".join((panel.caption, *notes))), kept)
        return
    there = [curve for curve in panel.curves if any(_worth(panel, curve.read(run)) for run in runs)]
    for curve in there:
        title = f"{panel.title}, {curve.label}" if curve.label and len(there) > 1 else panel.title
        lines = [replace(curve.read(run), label=letter(i), style=i, band=None) for i, run in enumerate(runs)]
        key = f"{panel.key}-{panel.curves.index(curve)}"
        yield from _with(replace(panel, key=key, title=title, curves=(curve,)), lines)


def _worth(panel: Panel, line: Line) -> bool:
    """Whether a line has something to show: reasons for which no pair was dropped do not."""
    return any(line.points[1]) if panel.key == "dead" else bool(line.points[0])


def _with(panel: Panel, lines: Iterable[Line]) -> Iterator[Panel]:
    """The panel with those of its lines that have points, if there are any."""
    found = tuple(line for line in lines if line.points[0])
    if found:
        yield replace(panel, lines=found)


def letter(index: int) -> str:
    """A, B, ... Z, AA, ...: what a run is called in plots."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def stage_seconds(run: RunRecord) -> dict[str, float]:
    """Seconds of all steps together by stage, in the stages' order, and what no stage accounts for."""
    seconds = {label: sum(run.curve(f"time/{stage}")[1]) for stage, label in STAGES.items()}
    rest = sum(run.curve("step_time")[1]) - sum(seconds.values())
    return {label: spent for label, spent in {**seconds, "other": max(0.0, rest)}.items() if spent > 0}
