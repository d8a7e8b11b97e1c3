"""What a method declares of itself, for the command line, the launcher and the table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from palate.config import MethodConfig
from palate.learn import Learner, Policy
from palate.recipe import Recipe
from palate.run import Run

__all__ = ["DIRECT", "METHOD_GROUPS", "Data", "Method", "Recipe"]

METHOD_GROUPS = ("supervised", "RL", "offline", "online")

Data = Literal["prompts", "pairs", "demonstrations"]
"""What a method learns from."""

DIRECT = "direct"
"""Value of a configuration's `variant` that takes a method's `direct` way."""


@dataclass(frozen=True)
class Method:
    """One method of the family.

    Attributes:
        train: the method itself; what it takes follows from `learns_from`: prompts come with an
            annotator, `(policy, annotate, prompts, cfg, run)`; pairs and demonstrations alone,
            `(policy, pairs, cfg, run, *, held_out=())`, with `Pair` or `Example` records.
        config: its numbers.
        summary: one line for people who choose.
        paper: where it comes from.
        group: its place in the family.
        learns_from: prompts to sample from, preference pairs, or completions to imitate.
        recipe: what it needs in its paper, for the table of methods.
        direct: the same method on preference pairs from data, without sampling, taken where the
            configuration's `variant` is "direct"; with the arguments of a method on pairs.
        learner: loads what is given to it, from (cfg, *, total_steps, seed). A learner that is no policy
            cannot be sampled from, and so is not compared with what it was.
        summarise: numbers for `summary.json` from (learner, run, held-out records), after training; if not
            given, what was measured on the held-out records at the start and at the end.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    summary: str
    paper: str
    group: Literal["supervised", "RL", "offline", "online"]
    learns_from: Data
    recipe: Recipe
    direct: Callable[..., None] | None = None
    learner: Callable[..., Learner] = Policy.load
    summarise: Callable[[Any, Run, Sequence[Any]], dict[str, float]] | None = None

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.train.__name__.replace("_", "-")

    def defaults(self) -> dict[str, Any]:
        """Fields and their default values."""
        return {name: f.default for name, f in self.config.model_fields.items() if not f.is_required()}

    def way(self, cfg: MethodConfig) -> tuple[Callable[..., None], Data]:
        """What is called under a configuration, and on what data."""
        if self.direct is not None and getattr(cfg, "variant", None) == DIRECT:
            return self.direct, "pairs"
        return self.train, self.learns_from
