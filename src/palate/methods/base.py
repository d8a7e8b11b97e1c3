"""What a method declares of itself, for the command line, the launcher and the table of methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from palate.config import MethodConfig

METHOD_GROUPS = ("supervised", "RL", "offline", "online")


@dataclass(frozen=True)
class Method:
    """One method of the family.

    Attributes:
        train: the method itself; what it takes follows from `learns_from`: prompts come with an
            annotator, `(policy, annotate, prompts, cfg, run)`; pairs alone, `(policy, pairs, cfg, run)`.
        config: its numbers.
        summary: one line for people who choose.
        paper: where it comes from.
        group: its place in the family.
        learns_from: prompts to sample from, or preference pairs.
    """

    train: Callable[..., None]
    config: type[MethodConfig]
    summary: str
    paper: str
    group: Literal["supervised", "RL", "offline", "online"]
    learns_from: Literal["prompts", "pairs"]

    @property
    def name(self) -> str:
        """As on the command line."""
        return self.train.__name__.replace("_", "-")

    def defaults(self) -> dict[str, Any]:
        """Fields and their default values."""
        return {name: f.default for name, f in self.config.model_fields.items() if not f.is_required()}
