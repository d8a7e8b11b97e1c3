"""The sampling stage of methods in steps: a batch of annotated samples per step, possibly sampled ahead."""

from __future__ import annotations

from collections.abc import Sequence

from palate.annotate import Annotator, beginning
from palate.config import Sampling
from palate.data import Stream
from palate.learn import Policy
from palate.model import Snapshot
from palate.model.rollouts import Drawn
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
    """The annotated samples of each step, which are sampled up to `ahead` steps early.

    The batch of step t is always sampled from the policy as it is before step max(0, t - ahead) (Noukhovitch
    et al. 2024, arXiv:2410.18252). A judge on a server is asked about a group as soon as its completions are
    finished, so it works while later batches are sampled and while the policy learns. If a server samples, it
    works meanwhile, too.

    A run that resumes reads the batches of earlier versions from the journal, where they are before each
    checkpoint. So replay is exact.

    Args:
        policy: the policy to sample from.
        annotate: the annotator.
        prompts: the training prompts, drawn in a shuffled order.
        n: completions per prompt.
        batch_size: prompts per step.
        steps: number of steps.
        sampling: options of sampling.
        ahead: number of steps; 0 samples each batch from the policy that learns from it.
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
        self._ahead = policy.lag = ahead
        self._waiting: dict[int, Drawn] = {}
        if ahead:
            run.settle = self._settle

    def groups(self, step: int) -> list[Group]:
        """Return the annotated groups of a step (from 0); call it once for each step, in order."""
        policy = self._policy.snapshot()
        begun = max(self._waiting, default=step - 1)
        for later in range(begun + 1, min(step + self._ahead, self._steps - 1) + 1):
            self._waiting[later] = self._begin(later, policy, resumed=later < step + self._ahead and step > 0)
        self._settle(wait=False)
        return self._annotate(self._waiting.pop(step).groups())

    def _begin(self, step: int, policy: Snapshot, *, resumed: bool) -> Drawn:
        """Begin to sample a batch: from the policy as it is, or as it was when the batch was begun first."""
        world, fact = self._run.world, f"version of the policy for batch {step}"
        known = world.lead(fact, lambda: self._run.journal.fact(fact)) if resumed else None
        if known is not None:
            policy = policy.recalled(int(known))
        elif self._ahead:
            world.lead(fact, lambda: self._run.journal.keep_fact(fact, str(policy.version)))
        batch = self._stream.batch(step, self._size)
        seed, begin = self._run.seed("sample", step), beginning(self._annotate)
        return policy.begin(batch, self._n, self._sampling, seed=seed, finished=begin)

    def _settle(self, *, wait: bool = True) -> None:
        """Keep the batches that are finished, or wait for all of them."""
        for drawn in self._waiting.values():
            if wait or (self._run.world.size == 1 and drawn.ready()):
                drawn.groups()
