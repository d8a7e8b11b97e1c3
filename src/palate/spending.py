"""The spending of a run, as upper bounds that follow from its configuration and the number of its rows.

Every method declares a function `spends(cfg, rows)` beside its recipe. Plans and comparisons at equal budgets
read it. The bounds count a run's training; the measurements before, during and after it are the same for all
methods and are added by the plan.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Annotations:
    """Groups of completions that the annotator gets.

    Attributes:
        groups: number of groups.
        size: completions per group.
    """

    groups: int
    size: int

    @property
    def scored(self) -> int:
        """Number of completions, each of which a scorer scores once."""
        return self.groups * self.size

    @property
    def compared(self) -> int:
        """Number of questions to a pairwise judge, which compares each two of a group in both orders."""
        return self.groups * self.size * (self.size - 1)


@dataclass(frozen=True)
class Spending:
    """Upper bounds of a run's training, in completions.

    Attributes:
        prompts: prompts that completions are sampled for, repetitions included; each is read once per draw.
        sampled: completions sampled, of at most `max_new_tokens` tokens each.
        annotations: groups that the annotator gets.
        steps: optimizer steps.
        learned: completions in updates; a completion counts in every pass.
        referenced: completions that are only scored by a model of the run, without a gradient: by a
            reference, or by a reward model that the run has trained.
        questions: questions to a pairwise judge besides those about the annotator's groups.
        replies: replies in which a model writes new prompts, of at most `new_prompt_tokens` tokens each.
        early: completions of `sampled` that are sampled at once, before the first step.
    """

    prompts: int = 0
    sampled: int = 0
    annotations: tuple[Annotations, ...] = ()
    steps: int = 0
    learned: int = 0
    referenced: int = 0
    questions: int = 0
    replies: int = 0
    early: int = 0

    def __add__(self, other: Spending) -> Spending:
        """Return the sum of two parts of a run."""
        return Spending(
            self.prompts + other.prompts,
            self.sampled + other.sampled,
            self.annotations + other.annotations,
            self.steps + other.steps,
            self.learned + other.learned,
            self.referenced + other.referenced,
            self.questions + other.questions,
            self.replies + other.replies,
            self.early + other.early,
        )

    @property
    def scored(self) -> int:
        """Number of completions that a scorer scores."""
        return sum(annotations.scored for annotations in self.annotations)

    @property
    def compared(self) -> int:
        """Number of questions to a pairwise judge."""
        return sum(annotations.compared for annotations in self.annotations)


@dataclass(frozen=True)
class Rows:
    """The data of a run, as far as its spending depends on them.

    Attributes:
        records: rows that the method learns from: prompts, pairs or demonstrations.
        distinct: distinct prompts among them.
        others: rows of a second data set, such as the human pairs of a first round.
        held_out: held-out rows.
    """

    records: int
    distinct: int
    others: int = 0
    held_out: int = 0


def drawn(prompts: int, n: int, *, size: int | None = None) -> Spending:
    """Return the spending on n completions for each of some prompts, which the annotator gets in groups.

    Args:
        prompts: number of prompts.
        n: completions per prompt.
        size: size of the groups, if it is not n; 0 if the annotator does not get them.
    """
    size = n if size is None else size
    groups = (Annotations(prompts, size),) if size and prompts else ()
    return Spending(prompts, prompts * n, annotations=groups)


def learnt(steps: int, batch: int, completions: int, *, referenced: int = 0) -> Spending:
    """Return the spending on optimizer steps.

    Args:
        steps: number of steps.
        batch: records per step.
        completions: the most completions per record.
        referenced: completions whose log-probabilities under a reference are computed.
    """
    return Spending(steps=steps, learned=steps * batch * completions, referenced=referenced)
