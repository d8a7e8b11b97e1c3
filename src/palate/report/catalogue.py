"""The panels that a report may have: which metrics each draws, and what it says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from palate.metrics import of_samples
from palate.rundir import RunRecord
from palate.rundir.record import Points

TRAINING, HELD_OUT = "training", "held out"
"""Labels of what is logged of a step's work, and of what is measured."""


@dataclass(frozen=True)
class Line:
    """A curve of one run.

    Attributes:
        points: steps and values.
        band: how far up and down the band around it reaches, at the same steps; none if empty.
        label: what stands at its end.
        style: which colour, dash and marker.
        measured: held out, so few points, each of which is drawn.
        once: of samples that were drawn once for all steps, so there is but one value.
    """

    points: Points
    label: str = ""
    style: int = 0
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    measured: bool = False
    once: bool = False


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


def _where_fresh(name: str) -> Callable[[RunRecord], Points]:
    """A metric that has its meaning only on samples of the policy as it is."""
    return lambda run: run.curve(name) if run.fresh else ((), ())


def _dropped(reason: str) -> Callable[[RunRecord], Points]:
    """Share of the groups of a step, or of a round, that gave no pair for a reason."""

    def share(run: RunRecord) -> Points:
        found = []
        for row in run.draws:
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
        "selected",
        "Reward of what is learnt from",
        "reward",
        "Of the samples that were kept, in this round or, where rounds add to a pool, in all of them.",
        (Curve("candidates/scores", "kept"), Curve("pool/scores", "pool"), Curve("threshold", "threshold")),
    ),
    Panel(
        "ranked",
        "Pairs ranked as the data do",
        "share of pairs",
        "Pairs in which the chosen completion has the higher reward. A coin gets half.",
        (
            Curve("accuracy", TRAINING),
            Curve("eval_accuracy", HELD_OUT, bounds=("eval_accuracy_low", "eval_accuracy_high")),
        ),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "ranked_shorter",
        "Where the shorter is better",
        "share of pairs",
        "The same on the held-out pairs in which length speaks for the other one.",
        (
            Curve(
                "eval_accuracy_shorter",
                HELD_OUT,
                bounds=("eval_accuracy_shorter_low", "eval_accuracy_shorter_high"),
            ),
        ),
        guide=0.5,
        rate=True,
    ),
    Panel(
        "ranked_margin",
        "Difference of reward",
        "log-odds",
        "Reward of chosen minus that of rejected.",
        (Curve("margin", TRAINING), Curve("eval_margin", HELD_OUT)),
        guide=0.0,
    ),
    Panel(
        "ece",
        "Calibration error",
        "probability",
        "How far the stated probabilities of a preference are from the shares in which it is so.",
        (Curve("eval_ece", HELD_OUT),),
        guide=0.0,
    ),
    Panel(
        "scores",
        "Rewards of a pair",
        "reward",
        "Means over pairs of the lower and of the higher reward of each. A drift of both says nothing.",
        (Curve("min_reward", "lower"), Curve("max_reward", "higher"), Curve("eval_mean_reward", HELD_OUT)),
    ),
    Panel(
        "kl",
        "KL to the start",
        "nats per completion",
        "How far the model has moved. It begins at 0 and should grow slowly.",
        (
            Curve("objective/kl", TRAINING, of=_where_fresh("objective/kl")),
            Curve("kl/fresh", "fresh samples"),
            Curve("eval_objective/kl", HELD_OUT),
        ),
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
        "Beta times how much likelier a text is than under the reference.",
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
            Curve("eval_logps/training", HELD_OUT),
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
        "share",
        "Groups, or pairs of candidates, that gave nothing: the rewards tie, the texts are the same, or no "
        "reward is usable.",
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
        "loss_parts",
        "Parts of the loss",
        "loss",
        "Before they are weighed: of the order, of what is to stay likely, of rejected tokens.",
        (Curve("rank_loss", "order"), Curve("nll_loss", "likelihood"), Curve("cringe_loss", "rejected")),
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
        "judge",
        "The judge",
        "share",
        "Questions without a usable verdict, and pairs of which one place wins whatever stands there.",
        (Curve("judge/unusable", "unusable"), Curve("judge/orders_disagree", "orders disagree")),
        rate=True,
    ),
    Panel("judge_cost", "Cost of the judge", "$", "Since the run began.", (Curve("judge/cost"),)),
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
