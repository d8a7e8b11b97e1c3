"""The needs of a method, as declared facts, and the answers that follow for the table of methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "no", "partly"]

Network = Literal["policy", "reference", "reward model", "value"]
"""A model that may have to be in memory."""


@dataclass(frozen=True)
class Cells:
    """A row of the table: four questions, to which "yes" is the pleasant answer, and a number of networks.

    Attributes:
        no_human_preferences: it needs no people's judgements of completions.
        unbiased_data: the policy that learns samples its own training data.
        online_feedback: completions that the policy samples later are judged, too.
        no_external_api: it needs no model of another provider.
        models: networks in memory with the standard recipe; in brackets with the alternative.
    """

    no_human_preferences: Answer
    unbiased_data: Answer
    online_feedback: Answer
    no_external_api: Answer
    models: str


@dataclass(frozen=True)
class Recipe:
    """The standard recipe of a method: its paper's, on one machine. Other recipes may be possible here.

    Attributes:
        preferences: source of the judgements, direct or through a reward model: people, another model, none
            (demonstrations alone), or people at the start only.
        samples: source of the completions: the policy at the step or at the start of the round, the policy
            before training, the policy beside other sources, or data alone.
        judged: completions are judged, or compared with data, once beforehand, in every round or in every
            step.
        networks: in memory during training. They include a judge that is asked in every round or step; a
            judge that is asked once is asked before training.
        alternative: the networks of another choice: fewer if the reference's log-probabilities are computed
            beforehand, more if the judge is asked during training; None without a choice.
        external: the judge is a large model of another provider, asked over a network.
    """

    preferences: Literal["human", "model", "none", "human seed"]
    samples: Literal["current", "start", "mixed", "data"]
    judged: Literal["once", "each round", "each step"]
    networks: tuple[Network, ...]
    alternative: tuple[Network, ...] | None = None
    external: bool = False

    @property
    def cells(self) -> Cells:
        """The answers that follow from the recipe."""
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
