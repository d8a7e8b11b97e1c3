"""Values between processes, and the shares of work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from palate.errors import BudgetError, ConfigError, DataError, ProcessError, RunError
from palate.learn.shards import SavedState, rows_of
from palate.world import Alone, current, join, own_part, shared_rows
from palate.world.ending import ending_of, raised
from palate.world.launcher import _code
from palate.world.start import Together, processes_around, threads_of
from palate.world.wire import decode, encode


def test_a_value_arrives_as_it_is() -> None:
    value = {"text": "ü\ud800\n", "numbers": [1, 2.5, None, True], "nan": float("nan"), "tuple": (1, (2,))}
    arrived = decode(encode(value))
    assert arrived["nan"] != arrived["nan"]
    assert arrived["tuple"] == [1, [2]]
    assert {k: arrived[k] for k in ("text", "numbers")} == {k: value[k] for k in ("text", "numbers")}


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3)])
@pytest.mark.parametrize("kind", [np.float32, np.int32, np.bool_, np.float64])
def test_arrays_arrive_with_shape_and_format(shape: tuple[int, ...], kind: Any) -> None:
    array = np.ones(shape, kind)
    first, raw, second = decode(encode([array, b"\x00\xff", {"a": array}]))
    assert raw == b"\x00\xff"
    for arrived in (first, second["a"]):
        assert (arrived.dtype, arrived.shape) == (array.dtype, array.shape)
        assert np.array_equal(arrived, array)
    first.fill(0)  # arrays can be changed


def test_parts_join_to_the_whole() -> None:
    items = list(range(7))
    for size in (1, 2, 3, 8):
        assert join([items[rank::size] for rank in range(size)], len(items)) == items


def test_one_process_does_everything_itself() -> None:
    assert isinstance(current(), Alone)
    assert own_part([1, 2, 3]) == [1, 2, 3]
    assert shared_rows("squares", [1, 2, 3], lambda own: [n * n for n in own]) == [1, 4, 9]
    assert current().lead("x", lambda: (1, 2)) == (1, 2)


def test_threads_are_divided_among_the_processes_of_a_machine() -> None:
    place = {"RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    assert processes_around(place) == 8
    assert threads_of(16, place) == 4
    assert threads_of(2, place) == 1
    assert threads_of(None, {}) is None
    assert threads_of(3, {}) == 3


def test_another_number_of_processes_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"processes is 3, but 1 is running; use `palate run METHOD --proc"):
        Together(3)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DataError("row 3"), ProcessError),
        (BudgetError("spent"), KeyboardInterrupt),
        (KeyError("bug"), ProcessError),
    ],
)
def test_the_error_of_one_process_is_that_of_the_others(error: Exception, kind: type) -> None:
    arrived = raised(ending_of(error, 1), 2)
    assert type(arrived) is kind
    assert str(error) in str(arrived)


@pytest.mark.parametrize(
    ("codes", "whole"),
    [
        ([0, 0], 0),
        ([0, 2], 2),
        ([1, -9], 1),
        ([-9, 1], 1),
        ([130, -9], 130),
        ([-9, -9], 137),
        ([1, 130], 130),
    ],
)
def test_the_exit_code_is_that_of_an_error_before_that_of_a_kill(codes: list[int], whole: int) -> None:
    assert _code(codes) == whole


@pytest.mark.parametrize("writers", [1, 2, 3, 5])
def test_saved_parts_are_read_by_any_number_of_processes(tmp_path: Path, writers: int) -> None:
    state = {"a": torch.arange(14.0).view(7, 2), "b": torch.arange(2.0), "step": torch.tensor(3.0)}
    shapes = {"shapes": json.dumps({name: list(tensor.shape) for name, tensor in state.items()})}
    for rank in range(writers):
        part = {k: t[slice(*rows_of(len(t), rank, writers))] if t.dim() else t for k, t in state.items()}
        path = tmp_path / f"state-{rank + 1:05}-of-{writers:05}.safetensors"
        save_file({k: t.contiguous() for k, t in part.items()}, path, metadata=shapes)
    saved = SavedState(tmp_path)
    assert saved.shapes == {"a": (7, 2), "b": (2,), "step": ()}
    for readers in (1, 2, 4, 9):
        for name, tensor in state.items():
            parts = [saved.part(name, rank, readers) for rank in range(readers)]
            assert torch.equal(torch.cat(parts) if tensor.dim() else parts[0], tensor)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    for rank in range(3):
        save_file({"a": torch.arange(2.0)}, tmp_path / f"state-{rank + 1:05}-of-00003.safetensors")
    SavedState(tmp_path)
    for rank in (3, 1):
        (tmp_path / f"state-{rank:05}-of-00003.safetensors").unlink()
        with pytest.raises(RunError, match=f"parts of 3 processes, but state-{min(rank, 3):05}-of-00003"):
            SavedState(tmp_path)
    (tmp_path / "state-00002-of-00003.safetensors").unlink()
    with pytest.raises(RunError, match="has no state of the optimizer"):
        SavedState(tmp_path)
