"""The sampling stage of methods in steps: a batch of annotated samples per step, possibly sampled ahead."""

from __future__ import annotations

from collections.abc import Sequence

from palate.annotate import Annotator, beginning
from palate.config import Sampling
from palate.data import Stream
from palate.learn import Policy
from palate.model import Snapshot
from palate.run import Run
from palate.types import Group, Prompt


def annotated_samples(
    policy: Snapshot, annotate: Annotator, prompts: Sequence[Prompt], n: int, sampling: Sampling, *, seed: int
) -> list[Group]:
    """Sample n completions of each prompt and annotate them.

    A judge on a server is asked about a group as soon as its completions are finished.
    """
    return annotate(policy.sample(prompts, n, sampling, seed=seed, finished=beginning(annotate)))


class Ahead:
    """The annotated samples of each step.

    With `ahead` = 1, the batch of step t is sampled from version max(0, t - 1) of the policy (Noukhovitch et
    al. 2024, arXiv:2410.18252): before the policy learns from a step's batch, the next one is sampled. A
    judge on a server is asked about a group as soon as its completions are finished, so it works while the
    next groups are sampled, and with `ahead` also while the policy learns.

    A run that resumes reads a batch of an earlier version from the journal, where it is since before the
    checkpoint. So replay is exact.

    Args:
        policy: the policy to sample from.
        annotate: the annotator.
        prompts: the training prompts, drawn in a shuffled order.
        n: completions per prompt.
        batch_size: prompts per step.
        steps: number of steps.
        sampling: options of sampling.
        ahead: 0 or 1.
        run: the method's run.
    """

    def __init__(
        self,
        policy: Policy,
        annotate: Annotator,
        prompts: Sequence[Prompt],
        *,
        n: int,
        batch_size: int,
        steps: int,
        sampling: Sampling,
        ahead: int,
        run: Run,
    ) -> None:
        self._policy, self._annotate, self._run = policy, annotate, run
        self._stream = Stream(prompts, seed=run.seed("prompts"))
        self._n, self._size, self._steps, self._sampling = n, batch_size, steps, sampling
        self._ahead, self._next = ahead, (-1, list[Group]())

    def groups(self, step: int) -> list[Group]:
        """Return the annotated groups of a step (from 0); call it once for each step, in order."""
        version, (at, groups) = self._policy.snapshot(), self._next
        if at != step:
            earlier = step > 0 and self._ahead > 0
            groups = self._sample(step, version.recalled(version.version - 1) if earlier else version)
        if self._ahead and step + 1 < self._steps:
            self._next = (step + 1, self._sample(step + 1, version))
        return self._annotate(groups)

    def _sample(self, step: int, policy: Snapshot) -> list[Group]:
        batch = self._stream.batch(step, self._size)
        seed, begin = self._run.seed("sample", step), beginning(self._annotate)
        return policy.sample(batch, self._n, self._sampling, seed=seed, finished=begin)
