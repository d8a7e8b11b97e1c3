"""Two processes do what one does: the same weights, samples and metrics, and the same errors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from palate.testing import tiny_model
from palate.world.wire import decode, encode

TRAINED = {
    "full_fast": "full_fast",
    "full_plain": "full_plain",
    "lora_fast": "lora_fast",
    "lora_plain": "lora_plain",
    "sharded_full_fast": "full_fast",
    "sharded_full_plain": "full_plain",
    "sharded_lora_fast": "lora_fast",
    "sharded_lora_plain": "lora_plain",
    "sharded_checkpointing": "full_fast",
    "sharded_nested": "full_fast",
    "rewards": "rewards",
    "sharded_rewards": "rewards",
}
"""The work of two processes, and the same work of one."""

SAMPLED = {
    "sampled": "sampled",
    "sharded_sampled": "sampled",
    "lora_sampled": "lora_sampled",
    "sharded_lora_sampled": "lora_sampled",
}

ROUNDED = {"sharded_bfloat16": "bfloat16", "sharded_lora_bfloat16": "lora_bfloat16"}
"""Sharded work in bfloat16, and the same of one process, which rounds at other places."""

METHODS = {"methods": "methods", "sharded_methods": "whole_methods"}

OTHERS = (
    *("not_finite", "sharded_not_finite", "other_batch", "other_place", "leader_fails", "random_reward"),
    *("sharded_alone", "torch_fails", "one_falls_back", "sharded_freed"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("together")
    tiny_model(directory / "model")
    return directory


@pytest.fixture
def both(place: Path, start: Any) -> dict[str, list[Any]]:
    """The results of two processes, rank by rank; computed once for all tests."""
    names = (*TRAINED, *SAMPLED, *ROUNDED, *METHODS, *OTHERS)
    if not (place / f"{names[-1]}.1").exists():
        for ended in start(str(place), "60", *names):
            assert ended.returncode == 0, ended.stderr
    return {name: [decode((place / f"{name}.{rank}").read_bytes()) for rank in (0, 1)] for name in names}


def alone(place: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location("scenarios", Path(__file__).with_name("scenarios.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return decode(encode(getattr(module, name)(place)))


@pytest.mark.parametrize(("name", "single"), TRAINED.items())
def test_two_processes_train_as_one_does(
    place: Path, both: dict[str, list[Any]], name: str, single: str
) -> None:
    one, (first, second) = alone(place, single), both[name]
    assert first["weights"].keys() == one["weights"].keys()
    moved = 0.0
    for key, expected in one["weights"].items():
        assert np.array_equal(first["weights"][key], second["weights"][key]), key
        if key.startswith("weight"):
            near(first["weights"][key], expected, key)
            moved = max(moved, float(np.abs(one["weights"][f"exp_avg/{key[7:]}"]).max()))
    assert moved > 1e-4  # the updates have changed something
    assert first["metrics"] == second["metrics"]
    for ours, theirs in zip(first["metrics"], one["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for metric, value in theirs.items():
            assert ours[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric
    for measured in first.keys() - {"weights", "metrics"}:
        same(first[measured], second[measured], 0.0)
        same(first[measured], one[measured], 1e-4)


def near(ours: Any, theirs: Any, key: str) -> None:
    """Checks weights after a few steps of Adam, of size 1e-3 each."""
    assert np.abs(ours - theirs).max(initial=0.0) < 1e-5, key


def same(ours: Any, theirs: Any, within: float) -> None:
    """Checks arrays, or mappings of numbers."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = (np.array([values[key] for key in sorted(values)]) for values in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=within, atol=within)


@pytest.mark.parametrize(("name", "single"), METHODS.items())
def test_a_method_needs_no_change_for_two_processes(
    place: Path, both: dict[str, list[Any]], name: str, single: str
) -> None:
    one, (first, second) = alone(place, single), both[name]
    assert one["weights"].keys() == first["weights"].keys()
    for method, expected in one["weights"].items():
        for key, weight in expected.items():
            ours, theirs = (result["weights"][method][key] for result in (first, second))
            assert np.array_equal(ours, theirs), (method, key)
            near(ours, weight, f"{method} {key}")


def test_the_reward_of_held_out_completions_is_loaded_in_one_process(both: dict[str, list[Any]]) -> None:
    assert [result["loaders"] for result in both["methods"]] == ["0", "0"]


def test_the_first_loss_of_dpo_is_log_2_to_the_last_bit(both: dict[str, list[Any]]) -> None:
    for name in (*TRAINED, *ROUNDED):
        if "rewards" not in name:
            assert both[name][0]["metrics"][0]["rewards/margins"] == 0.0


@pytest.mark.parametrize(("name", "single"), SAMPLED.items())
def test_two_processes_sample_the_rows_of_one(
    place: Path, both: dict[str, list[Any]], name: str, single: str
) -> None:
    one, (first, second) = alone(place, single), both[name]
    assert first["tokens"] == second["tokens"] == one["tokens"]
    for ours, other, expected in zip(first["scored"], second["scored"], one["scored"], strict=True):
        assert np.array_equal(ours, other)
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    if "lora" in name:  # three versions of one policy
        assert not np.allclose(first["scored"][0], first["scored"][1], atol=1e-3)
        assert not np.allclose(first["scored"][1], first["scored"][2], atol=1e-3)
        assert one["tokens"][0] != one["tokens"][1]


@pytest.mark.parametrize(("name", "single"), ROUNDED.items())
def test_sharded_bfloat16_trains_as_one_process_does_to_its_precision(
    place: Path, both: dict[str, list[Any]], name: str, single: str
) -> None:
    from palate.testing import tiny_policy

    one, (first, second) = alone(place, single), both[name]
    trained = tiny_policy(place / "model", lora="lora" in name).model.trained()
    start = {f"weight/{n}": p.detach().float().numpy() for n, p in trained}
    for key, expected in one["weights"].items():
        assert np.array_equal(first["weights"][key], second["weights"][key])
        if key.startswith("weight"):
            # A step of Adam has the size of the learning rate, even where rounding decides its direction.
            difference = np.abs(first["weights"][key] - expected)
            assert difference.mean() < 0.25 * np.abs(expected - start[key]).mean(), key


def test_process_0_alone_cannot_use_a_sharded_model(both: dict[str, list[Any]]) -> None:
    for result in both["sharded_alone"]:
        assert result["error"] == "ConfigError"
        assert "use --sharding none, or another judge" in result["said"]


@pytest.mark.parametrize("name", ["not_finite", "sharded_not_finite"])
def test_a_loss_that_is_not_finite_in_one_process_is_skipped_by_both(
    both: dict[str, list[Any]], name: str
) -> None:
    assert both[name] == [{"skipped": 1, "same": True, "version": 1}] * 2


def test_a_process_with_another_batch_is_refused_by_name(both: dict[str, list[Any]]) -> None:
    for result in both["other_batch"]:
        assert result["error"] == "RunError"
        assert "the batch of an update differs between the processes: process 1 of 2" in result["said"]


def test_processes_at_different_places_say_where_they_are(both: dict[str, list[Any]]) -> None:
    for rank, result in enumerate(both["other_place"]):
        assert result["error"] == "ProcessError"
        assert f"process {rank} at 'corner {rank}'" in result["said"]


def test_an_error_of_torch_is_not_the_death_of_another_process(both: dict[str, list[Any]]) -> None:
    for result in both["torch_fails"]:
        assert result["error"] == "ProcessError"
        assert result["said"] == "the processes cannot do 'the meeting' together: no such network interface"


def test_all_processes_compute_on_one_path(both: dict[str, list[Any]]) -> None:
    assert both["one_falls_back"] == [{"engine": "PlainEngine"}] * 2


def test_the_copy_for_sampling_is_freed_before_learning(both: dict[str, list[Any]]) -> None:
    for result in both["sharded_freed"]:
        assert (result["before"], result["after"], result["shown"]) == (True, False, 0)
        assert "logps/fresh is not measured" in result["lines"][0]


def test_an_error_of_the_leader_is_that_of_all(both: dict[str, list[Any]]) -> None:
    assert both["leader_fails"] == [{"error": "PalateError", "said": "row 3 is empty; fill it"}] * 2


def test_a_reward_is_asked_in_one_process_and_known_in_all(both: dict[str, list[Any]]) -> None:
    first, second = both["random_reward"]
    assert first["rewards"] == second["rewards"]
    assert (first["calls"], second["calls"]) == ([2], [])


def test_a_process_that_does_not_come_is_named(tmp_path: Path, start: Any) -> None:
    first, _ = start(str(tmp_path), "2", "late")
    assert first.returncode == 0, first.stderr
    said = decode((tmp_path / "late.0").read_bytes())["said"]
    assert said.startswith("process 1 of 2 did not reach 'the meeting' within 2 s, it is at ")


def test_a_process_that_crashes_is_named_and_says_where_it_was(tmp_path: Path, start: Any) -> None:
    first, second = start(str(tmp_path), "60", "crashed")
    assert (first.returncode, second.returncode) == (0, -11), first.stderr
    said = decode((tmp_path / "crashed.0").read_bytes())["said"]
    assert said.startswith("process 1 of 2 ended without an error message")
    assert "Segmentation fault" in second.stderr
    assert "scenarios.py" in second.stderr


def test_a_process_that_waits_inside_of_torch_ends_with_the_others(tmp_path: Path, start: Any) -> None:
    first, second = start(str(tmp_path), "60", "stuck")
    assert (first.returncode, second.returncode) == (2, 2), first.stderr
    assert first.stderr.count("row 3 is empty") + second.stderr.count("row 3 is empty") == 1
