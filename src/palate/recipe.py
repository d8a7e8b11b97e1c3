"""What a method needs, as declared facts, and the answers of the table of methods that follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Answer = Literal["yes", "no", "partly"]

Network = Literal["policy", "reference", "reward model", "value"]
"""What may have to be in memory."""


@dataclass(frozen=True)
class Cells:
    """A row of the table: four questions, to which "yes" is the pleasant answer, and a number of networks.

    Attributes:
        no_human_preferences: it can do without people's judgements of completions.
        unbiased_data: what is learnt from is drawn from the policy that learns.
        online_feedback: what the policy says later is judged, too.
        no_external_api: no model of others has to be asked.
        models: networks in memory with the standard recipe; in brackets with the alternative.
    """

    no_human_preferences: Answer
    unbiased_data: Answer
    online_feedback: Answer
    no_external_api: Answer
    models: str


@dataclass(frozen=True)
class Recipe:
    """The standard recipe of a method: that of its paper, on one machine, whatever else it may be given here.

    Attributes:
        preferences: whose judgement of completions is learnt from, directly or through a reward model:
            people's, another model's, nobody's (demonstrations alone), or people's at the start only.
        samples: where the completions come from: the policy as it is at the step or was at the beginning of
            the round, the policy before training, the policy beside other sources, or data alone.
        judged: how often completions are judged, or told from data: once beforehand, or anew in every round
            or every step, as the policy changes.
        networks: in memory while it trains. A judge is among them where it is asked again in every round or
            step; one that is asked once is asked beforehand.
        alternative: fewer where the reference has been asked beforehand, more where the judge has not; None
            where there is nothing to choose.
        external: the judge is a large model of others, asked over a network.
    """

    preferences: Literal["human", "model", "none", "human seed"]
    samples: Literal["current", "start", "mixed", "data"]
    judged: Literal["once", "each round", "each step"]
    networks: tuple[Network, ...]
    alternative: tuple[Network, ...] | None = None
    external: bool = False

    @property
    def cells(self) -> Cells:
        """The answers that follow."""
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
