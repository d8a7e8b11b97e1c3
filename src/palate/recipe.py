"""The needs of a method, as declared facts, and the cells of the table of methods that follow from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True)
class Share:
    """How a method spends its share of a comparison: a number of completions and of optimizer steps.

    Attributes:
        when: the time of sampling. `pairs` and `demonstrations` come from a pool of the base model's
            completions, which are labelled beforehand and paid for; `once` samples before training; `each
            round` and `each step` sample the current policy.
        n: completions per prompt: of a prompt of the pool, of a round or of a step.
        rounds: rounds of sampling and training.
        stages: training stages of a round, which divide its optimizer steps.
        own: completions of each demonstration's prompt that the method samples in each round.
        epochs: optimizer steps per batch of samples, for `each step`.
        epochs_of: that number from the options that a method is given; None if it is always `epochs`.
        labelled: share of the completions and of the optimizer steps with which a method in steps first
            trains a reward model of its own: the annotator compares two completions of each prompt.
        fixed: further settings that the comparison needs.
    """

    when: Literal["pairs", "demonstrations", "once", "each round", "each step"]
    n: int = 4
    rounds: int = 1
    stages: int = 1
    own: int = 0
    epochs: int = 1
    epochs_of: Callable[[Mapping[str, Any]], int] | None = None
    labelled: float = 0.0
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def spent(self, paid: Callable[[int], int], steps: int, prompts: int) -> Spent:
        """Return the settings that spend a number of completions and optimizer steps.

        Where the data have too few prompts, each prompt gets more completions.

        Args:
            paid: the completions that the budget pays for, the pool's included, if a prompt has so many.
            steps: optimizer steps to take.
            prompts: number of prompts in the data.

        Raises:
            ValueError: the budget is too small for the method.
        """
        training, first = self.rounds * self.stages * self.epochs, int(self.labelled * steps)
        needed = training + bool(self.labelled)
        if steps - first < training or first < bool(self.labelled):
            raise ValueError(f"{steps} optimizer steps are too few for its {needed} stages of training")
        fixed, each = dict(self.fixed), (steps - first) // training
        completions = paid(self.n)
        if self.when == "each step":
            if self.labelled:
                pairs = min(prompts, int(self.labelled * paid(2)) // 2)
                if pairs < 2:
                    raise ValueError(f"{completions} completions leave fewer than two prompts to compare")
                fixed |= {"candidates": 2, "preference_prompts": pairs, "reward_steps": first}
                completions -= 2 * pairs
            batch = completions // (self.n * each)
            if batch < 1:
                raise ValueError(
                    f"{completions} completions are fewer than {self.n} for each of {each} steps"
                )
            return Spent({**fixed, "n": self.n, "batch_size": batch, "steps": each}, 0, 0)
        rounds = self.rounds if self.when == "each round" else 1
        n, own = self.n, self.own * self.rounds
        while paid(n) > prompts * rounds * (n + own):
            n += 1
        completions = paid(n)
        rows = completions // ((n + own) * rounds)
        if rows < 2:
            raise ValueError(f"{completions} completions are fewer than {n} for each of two prompts")
        if self.when in ("pairs", "demonstrations"):
            played = {"rounds": self.rounds} if self.own else {}
            return Spent({**fixed, **played, "limit": rows, "steps": each}, rows, n)
        if self.when == "once":
            return Spent({**fixed, "n": n, "limit": rows, "steps": each}, 0, 0)
        round_settings = {"n": n, "prompts_per_round": rows, "rounds": self.rounds, "steps": each}
        return Spent({**fixed, **round_settings}, 0, 0)


@dataclass(frozen=True)
class Spent:
    """The settings of a method's share.

    Attributes:
        settings: values by field name.
        pool_prompts: prompts of the pool that the method gets, from the start.
        pool_n: completions of each of these prompts; 0 without a pool.
    """

    settings: Mapping[str, Any]
    pool_prompts: int
    pool_n: int
