"""An endless shuffled order of items, addressed by position, so that resuming a run needs only its step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from palate.errors import DataError

T = TypeVar("T")


class Stream(Generic[T]):
    """Endless epochs of items: each epoch has every item once, in its own order.

    The order depends only on the seed, the epoch and the number of items: not on earlier batches, the
    machine or the version of numpy. Raises DataError if
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
        """Return items step * size up to (step + 1) * size of the stream; a batch may span two epochs."""
        assert step >= 0, "steps count from 0"
        assert size >= 1, "a batch has at least one item"
        return [self._at(position) for position in range(step * size, (step + 1) * size)]

    def once(self) -> Iterator[T]:
        """Yield every item once, in the order of the first epoch."""
        return map(self._at, range(len(self.items)))

    def _at(self, position: int) -> T:
        epoch, index = divmod(position, len(self.items))
        return self.items[int(_order(len(self.items), self.seed, epoch)[index])]


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """Return a permutation by sorting raw bits, which are the same in all versions of numpy."""
    bits = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.flags.writeable = False  # shared by the cache
    return order
