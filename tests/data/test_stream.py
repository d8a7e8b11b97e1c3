import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.data import Stream
from palate.errors import DataError

counts = st.integers(1, 40)
seeds = st.integers(0, 2**70)


@given(count=counts, size=st.integers(1, 25), seed=seeds)
def test_each_epoch_has_every_item_once(count, size, seed):
    stream = Stream(range(count), seed=seed)
    taken = [item for step in range(-(-3 * count // size)) for item in stream.batch(step, size)]
    for epoch in range(3):
        assert sorted(taken[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=counts, size=st.integers(1, 25), seed=seeds, steps=st.lists(st.integers(0, 10**6), max_size=5))
def test_a_batch_depends_on_its_position_alone(count, size, seed, steps):
    items = [f"item {i}" for i in range(count)]
    asked_before = Stream(items, seed=seed)
    for step in steps:
        asked_before.batch(step, size)
    assert asked_before.batch(7, size) == Stream(items, seed=seed).batch(7, size)
    halves = [item for step in (14, 15) for item in asked_before.batch(step, size)]
    assert halves == asked_before.batch(7, 2 * size)


def test_once_is_the_first_epoch_read_as_it_is_needed():
    class Items(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    items = Items("abcdefgh")
    stream = Stream(items, seed=3)
    first = stream.once()
    assert [next(first), next(first)] == ["d", "c"]
    assert items.reads == 2
    assert list(stream.once()) == stream.batch(0, 8)


def test_epochs_and_seeds_differ():
    stream = Stream(range(100), seed=0)
    assert stream.batch(0, 100) != stream.batch(1, 100)
    assert stream.batch(0, 100) != Stream(range(100), seed=1).batch(0, 100)
    # seed s, epoch e must not be seed s + 1, epoch e - 1
    assert stream.batch(1, 100) != Stream(range(100), seed=1).batch(0, 100)


def test_the_order_is_the_same_on_every_machine():
    assert Stream("abcdefgh", seed=3).batch(0, 8) == list("dcahbefg")


def test_places_are_evenly_spread():
    first = [Stream(range(5), seed=seed).batch(0, 1)[0] for seed in range(2000)]
    assert all(abs(first.count(item) - 400) < 100 for item in range(5))  # 5.6 standard deviations


def test_no_items():
    with pytest.raises(DataError, match="nothing to train on"):
        Stream([], seed=0)
