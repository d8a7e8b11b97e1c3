"""Means over the records and the tokens of an update, over its micro-batches and its processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from palate.model import Outputs
from palate.types import Record
from palate.world import current

Metrics = dict[str, float]


class Meter:
    """Means over the records and the tokens of an update.

    Attributes:
        gap_max: largest difference of a token's log-probability between sampler and learner, in nats.
        problem: description of a loss that is not finite; empty without one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, tuple[float, int]] = {}
        self.tokens: dict[str, float] = {}
        self.token_count = 0
        self.gap_sum = self.gap_max = 0.0
        self.gap_count = 0
        self.problem = ""

    def add(self, numbers: Mapping[str, Tensor]) -> None:
        """Add numbers per record; NaN counts as not applicable, except in the loss."""
        for name, values in numbers.items():
            applies = values.detach().double() if name == "loss" else values[~values.isnan()].double()
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + float(applies.sum()), count + len(applies)

    def add_tokens(
        self, outputs: Outputs, records: Sequence[Record], version: int | None, *, lag: int = 0
    ) -> int:
        """Add token means and the gap between the sampler's and the learner's log-probabilities.

        The gap is that of completions from this version, or from one that is up to `lag` updates older.

        Returns:
            The number of tokens.
        """
        if outputs.logps is None:
            return 0
        tokens = int(outputs.logps.mask.sum())
        self.token_count += tokens
        means = {
            "entropy": outputs.entropy,
            "mean_token_accuracy": outputs.top1,
            "logps/training": outputs.logps,  # the difference to `logps/fresh` shows a distribution shift
        }
        for name, values in means.items():
            if values is not None:
                self.tokens[name] = self.tokens.get(name, 0.0) + float(values.values.detach().double().sum())
        completions = [c for record in records for c in record.completions]
        for row, completion in zip(outputs.logps.rows(), completions, strict=True):
            drawn = completion.policy_version
            if version is None or drawn is None or completion.logps is None:
                continue
            if version - lag <= drawn <= version:
                gap = (row.detach().cpu() - torch.tensor(completion.logps)).abs()
                self.gap_sum += float(gap.sum())
                self.gap_max = max(self.gap_max, float(gap.max()))
                self.gap_count += len(gap)
        return tokens

    @property
    def gap_mean(self) -> float:
        """The mean difference of a token's log-probability between sampler and learner, in nats."""
        return self.gap_sum / max(1, self.gap_count)

    def share(self, name: str) -> None:
        """Add up what the processes have measured; each has the same result afterwards."""
        if current().size == 1:
            return
        parts = current().gather(name, vars(self))
        self.__init__()  # type: ignore[misc]
        for part in parts:
            for metric, (total, count) in part["sums"].items():
                before, so_far = self.sums.get(metric, (0.0, 0))
                self.sums[metric] = before + total, so_far + count
            for metric, total in part["tokens"].items():
                self.tokens[metric] = self.tokens.get(metric, 0.0) + total
            self.token_count += part["token_count"]
            self.gap_sum += part["gap_sum"]
            self.gap_max = max(self.gap_max, part["gap_max"])
            self.gap_count += part["gap_count"]
            self.problem = self.problem or part["problem"]

    def result(self) -> Metrics:
        """Return the means."""
        metrics = {name: total / count for name, (total, count) in self.sums.items() if count}
        metrics |= {name: total / self.token_count for name, total in self.tokens.items()}
        if self.token_count:
            metrics["num_tokens"] = self.token_count
        if self.gap_count:
            metrics["sampling/sampling_logp_difference/mean"] = self.gap_mean
            metrics["sampling/sampling_logp_difference/max"] = self.gap_max
        return metrics
