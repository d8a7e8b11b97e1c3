"""The needs of a method, as declared facts, and the cells of the table of methods that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "no", "partly"]

Network = Literal["policy", "reference", "reward model", "value"]
"""A model that a method may need in memory."""


@dataclass(frozen=True)
class Cells:
    """A row of the table: four questions for which "yes" is the better answer, and a number of networks.

    Attributes:
        no_human_preferences: the method needs no human judgements of completions.
        unbiased_data: the trained policy samples its own training data.
        online_feedback: completions sampled during training are judged, too.
        no_external_api: the method needs no model of another provider.
        models: number of networks in memory with the standard recipe; in brackets with the alternative.
    """

    no_human_preferences: Answer
    unbiased_data: Answer
    online_feedback: Answer
    no_external_api: Answer
    models: str


@dataclass(frozen=True)
class Recipe:
    """The standard recipe of a method: the paper's recipe on one machine. Palate may allow others.

    Attributes:
        preferences: source of the judgements, direct or through a reward model: people, another model, none
            (demonstrations only), or people at the start only.
        samples: source of the completions: the policy at the step or at the start of the round, the policy
            before training, the policy and other sources, or data only.
        judged: time of the judgements or comparisons with data: once before training, in every round or in
            every step.
        networks: networks in memory during training, including a judge that is used in every round or step;
            a judge that is used once works before training.
        alternative: networks of another choice: fewer if the reference's log-probabilities are computed
            before training, more if the judge works during training; None without a choice.
        external: True if the judge is a large model of another provider, reached over a network.
    """

    preferences: Literal["human", "model", "none", "human seed"]
    samples: Literal["current", "start", "mixed", "data"]
    judged: Literal["once", "each round", "each step"]
    networks: tuple[Network, ...]
    alternative: tuple[Network, ...] | None = None
    external: bool = False

    @property
    def cells(self) -> Cells:
        """The row of the table that follows from the recipe."""
        by_people: dict[str, Answer] = {"human": "no", "human seed": "partly"}
        own: dict[str, Answer] = {"current": "yes", "data": "no"}
        models = str(len(self.networks))
        return Cells(
            no_human_preferences=by_people.get(self.preferences, "yes"),
            unbiased_data=own.get(self.samples, "partly"),
            online_feedback="no" if self.judged == "once" else "yes",
            no_external_api="no" if self.external else "yes",
            models=models if self.alternative is None else f"{models} ({len(self.alternative)})",
        )
