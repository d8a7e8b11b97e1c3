"""A bound on the KL: training ends with the last checkpoint within it, also after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from palate.annotate import Annotator
from palate.learn import Policy
from palate.run import BoundReachedError, Drift, Run

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

Toy = Any

GROWING = {1: 0.5, 2: 1.0, 3: 2.0, 4: 4.0, 5: 8.0, 6: 16.0}


@pytest.fixture
def bounded(toy: Toy) -> Callable[..., Toy]:
    """The toy method under a bound, with a KL that grows as it is written here."""

    def make(most: float | None, every: int = 2, kl: dict[int, float] = GROWING, **options: Any) -> Toy:
        class Bounded(type(toy)):  # type: ignore[misc]
            def _train(self, policy: Policy, annotate: Annotator, cfg: Any, run: Run) -> None:
                run.drift = Drift(kl.__getitem__, every, most)
                with suppress(BoundReachedError):
                    super()._train(policy, annotate, cfg, run)

        return Bounded(toy.options | {"steps": 6} | options)

    return make


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("most", "every", "last"),
    [(100.0, 2, 6), (16.0, 5, 6), (8.0, 2, 4), (3.0, 2, 2), (0.9, 1, 1), (0.1, 1, 0)],
)
@pytest.mark.parametrize("lora", [True, False])
def test_training_ends_with_the_last_checkpoint_within(
    bounded: Callable[..., Toy], tmp_path: Path, same: Any, most: float, every: int, last: int, lora: bool
) -> None:
    # Checkpoints come at times of their own; those after the last measurement within are of no use.
    run, policy = bounded(most, every, lora=lora, checkpoint_every=1, keep_checkpoints=1)()
    assert policy.version == last
    assert f"step-{last}" in names(run.directory)
    assert not [name for name in names(run.directory) if int(name.removeprefix("step-")) > last]
    if last:
        _, expected = bounded(None, steps=last, lora=lora)(output=tmp_path / "other")
        assert same(policy, expected)


def test_the_measurements_are_written(bounded: Callable[..., Toy], rows: Any) -> None:
    toy = bounded(8.0)
    run, _ = toy()
    measured = {row["step"]: row["kl/fresh"] for row in rows(run.directory) if "kl/fresh" in row}
    assert measured == {2: 1.0, 4: 4.0, 6: 16.0}
    assert any("the KL after step 6 is 16.00 nats, above max_kl 8" in line for line in toy.said)
    assert json.loads((run.directory / "summary.json").read_text()) == {"steps": 4}


def test_without_a_bound_it_only_measures(bounded: Callable[..., Toy], rows: Any) -> None:
    run, policy = bounded(None, every=4)()
    assert policy.version == 6
    assert [row["step"] for row in rows(run.directory) if "kl/fresh" in row] == [4]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5])
def test_an_interrupted_run_ends_with_the_same(
    bounded: Callable[..., Toy], interrupted: Any, tmp_path: Path, same: Any, rows: Any, at: int
) -> None:
    toy = bounded(3.0, checkpoint_every=3)
    whole, expected = toy(output=tmp_path / "whole")
    interrupted(toy, min(at, 3))  # the fourth step is its last
    resumed, policy = toy()
    assert same(policy, expected)
    assert rows(resumed.directory) == rows(whole.directory)


def test_a_run_that_has_ended_is_not_trained_on(
    bounded: Callable[..., Toy], same: Any, rows: Any, tmp_path: Path
) -> None:
    toy = bounded(3.0)
    run, expected = toy()
    before, asked = rows(run.directory), len(toy.asked)
    again, policy = toy()
    assert same(policy, expected)
    assert rows(again.directory) == before
    assert len(toy.asked) == asked


def test_a_process_that_is_killed_at_any_moment(
    bounded: Callable[..., Toy], dies: Any, tmp_path: Path, same: Any, rows: Any
) -> None:
    toy = bounded(3.0, checkpoint_every=1, keep_checkpoints=1)
    whole, expected = toy(output=tmp_path / "whole")
    directory = toy.options["output"]
    deaths = sum(dies(toy, directory, n) for n in (1, 5, 9, 14, 20, 26, 33, 40, 45, 50, 55, 60, 66, 73, 80))
    _, policy = toy()
    assert deaths >= 8
    assert same(policy, expected)
    assert rows(directory) == rows(whole.directory)
    assert names(directory) == names(whole.directory)
