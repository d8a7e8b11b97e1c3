"""An endless shuffled order of items, addressed by position, so that resuming a run needs its step alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from palate.errors import DataError

T = TypeVar("T")


class Stream(Generic[T]):
    """Items in epochs without end: each epoch has every item once, in an order of its own.

    The order depends on the seed, the epoch and the number of items, and on nothing else: not on which
    batches were asked for before, nor on the machine, nor on the version of numpy. Raises DataError if
    there are no items.
    """

    def __init__(self, items: Sequence[T], *, seed: int) -> None:
        if len(items) == 0:
            raise DataError(
                "There is nothing to train on: no item of the data is left; expected at least one."
            )
        assert seed >= 0, "a seed is not negative"
        self.items = items
        self.seed = seed

    def batch(self, step: int, size: int) -> list[T]:
        """Items step * size up to (step + 1) * size of the stream; a batch may cross from epoch to epoch."""
        assert step >= 0, "steps count from 0"
        assert size >= 1, "a batch has at least one item"
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def _at(self, position: int) -> T:
        epoch, index = divmod(position, len(self.items))
        return self.items[int(_order(len(self.items), self.seed, epoch)[index])]


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """A permutation by sorting raw bits: they stay the same from numpy to numpy, its shuffles need not."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.flags.writeable = False  # shared by the cache
    return order
