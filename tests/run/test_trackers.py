from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from palate.errors import ConfigError
from palate.run.trackers import Trackers


def test_without_trackers_nothing_is_written_or_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # an import of it would fail
    trackers = Trackers((), tmp_path / "trackers", {})
    trackers.log({"loss": 1.0}, step=1)
    trackers.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["tensorbord", "TensorBoard", "all", "mlflow", ""])
def test_an_unknown_tracker(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"report_to '{name}' is unknown; expected one of tensorboard, wan"):
        Trackers((name,), tmp_path, {})


def test_a_tracker_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="'trackio' needs a package: run `pip install trackio`"):
        Trackers(("trackio",), tmp_path, {})


def test_tensorboard_gets_every_number_at_its_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # The configuration has values of kinds that TensorBoard does not take.
    config = {"beta": 0.1, "reward": ["sentiment"], "limit": None, "map": {"a": "b"}, "lora": True}
    trackers = Trackers(("tensorboard",), tmp_path / "trackers", config)
    trackers.log({"loss": 0.75, "rewards/chosen": 1}, step=1)
    trackers.log({"loss": 0.5}, step=2)
    trackers.close()
    files = (tmp_path / "trackers").rglob("events.out.tfevents.*")  # one for numbers, one for the config
    found = [EventAccumulator(str(file)).Reload() for file in files]
    (read,) = [events for events in found if "loss" in events.Tags()["scalars"]]
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 0.75), (2, 0.5)]
    assert [(e.step, e.value) for e in read.Scalars("rewards/chosen")] == [(1, 1.0)]
