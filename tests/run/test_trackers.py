from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import LoggerType

from palate.config import RunConfig
from palate.errors import ConfigError
from palate.journal import Journal
from palate.run.metrics import MetricsLog
from palate.run.trackers import Trackers


def make(names: tuple[str, ...], directory: Path, config: Mapping[str, Any] | None = None) -> Trackers:
    return Trackers(names, directory, config or {}, id="0123456789abcdef", name="mine")


def test_without_trackers_nothing_is_written_or_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import of it would fail
    trackers = make((), tmp_path / "trackers")
    trackers.start(after=0)
    trackers.log({"loss": 1.0}, step=1)
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorbord", "TensorBoard", "all", "mlflow", ""])
def test_an_unknown_tracker(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"report_to '{name}' is unknown; expected one of tensorboard, wan"):
        make((name,), tmp_path)


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'trackio' needs a package: run `pip install trackio`"):
        make(("trackio",), tmp_path)


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The configuration has values of kinds that TensorBoard does not take.
    config = {"beta": 0.1, "reward": ["sentiment"], "limit": None, "map": {"a": "b"}, "lora": True}
    trackers = make(("tensorboard",), tmp_path / "trackers", config)
    trackers.start(after=0)
    trackers.log({"loss": 0.75, "rewards/chosen": 1}, step=1)
    trackers.log({"loss": 0.5}, step=2)
    trackers.close()
    files = (tmp_path / "trackers").rglob("events.out.tfevents.*")  # one for numbers, one for the config
    found = [EventAccumulator(str(file)).Reload() for file in files]
    (read,) = [events for events in found if "loss" in events.Tags()["scalars"]]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert [(e.step, e.value) for e in read.Scalars("rewards/chosen")] == [(1, 1.0)]


def test_tensorboard_continues_the_same_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for after, steps, loss in ((0, (1, 2, 3), 1.0), (2, (3, 4), 0.5)):  # interrupted after step 3, from 2 on
        trackers = make(("tensorboard",), tmp_path, {"beta": 0.1})
        trackers.start(after=after)
        for step in steps:
            trackers.log({"loss": loss}, step=step)
        trackers.close()
        runs = {file.parent for file in tmp_path.rglob("events.out.tfevents.*")}
        assert len(runs) == 2  # one for the numbers and one for the configuration, after each start
    read = EventAccumulator(str(tmp_path / "palate")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5)]


@pytest.mark.parametrize(
    ("tracker", "options"),
    [
        ("wandb", {"id": "0123456789abcdef", "name": "mine-01234567", "resume": "allow"}),
        ("trackio", {"name": "mine-01234567", "resume": "allow"}),
    ],
)
def test_others_are_asked_for_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, options: dict[str, str]
) -> None:
    starts: list[dict[str, Any]] = []
    rows: list[tuple[dict[str, float], int]] = []

    class Started:
        def log(self, values: dict[str, float], step: int) -> None:
            rows.append((values, step))

        def finish(self) -> None:
            pass

    def init(**given: Any) -> Started:
        starts.append(given)
        return Started()

    module = types.ModuleType(tracker)
    settings = types.SimpleNamespace(update=lambda values, allow_val_change: None)
    vars(module).update(init=init, config=settings)
    module.__spec__ = importlib.util.spec_from_loader(tracker, loader=None)
    monkeypatch.setitem(sys.modules, tracker, module)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType(tracker)])
    for after in (0, 2):
        trackers = make((tracker,), tmp_path)
        trackers.start(after=after)
        trackers.log({"loss": 1.0}, step=after + 1)
        trackers.close()
    assert starts == [{"project": "palate", **options}] * 2
    assert rows == [({"loss": 1.0}, 1), ({"loss": 1.0}, 3)]


def test_a_run_keeps_its_name_and_steps_in_trackers_when_it_moves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = tmp_path / "first"
    place.mkdir()
    for step in (1, 2):
        journal = Journal(place / "journal.db")
        if step == 1:
            journal.keep_fact("run", "0123456789abcdef")
        metrics = MetricsLog(place, journal, RunConfig(report_to=("tensorboard",)))
        metrics.begin()
        metrics.write({"step": step, "loss": 0.5})
        metrics.close()
        assert journal.fact("name in trackers") == "first"
        journal.close()
        place = place.rename(tmp_path / "second")
    read = EventAccumulator(str(place / "trackers" / "palate")).Reload()
    assert [e.step for e in read.Scalars("loss")] == [1, 2]
