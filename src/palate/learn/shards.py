"""A learner's saved tensors: one file, or a file with a part from each process, for any number of readers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from palate.errors import RunError
from palate.learn.learner import Learner
from palate.model.sharded import local_part
from palate.world import current

FILE = "state.safetensors"
"""The file with the optimizer's weights and moments, in the directory of a checkpoint's model."""

PARTS = "state-*-of-*.safetensors"
"""The files of a sharded learner; each has a run of rows of every tensor, in the order of the processes."""

PART = PARTS.replace("*", "{:05}")
"""The name of one of these files, from its number, counted from 1, and their number."""

_SHAPES = "shapes"


def save_part(learner: Learner, directory: Path) -> Path:
    """Write this process's part of a sharded learner's tensors; return the file."""
    state = learner.optimizer.state()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    tensors = {name: local_part(tensor).contiguous() for name, tensor in state.items()}
    world = current()
    path = directory / PART.format(world.rank + 1, world.size)
    save_file(tensors, path, metadata={_SHAPES: json.dumps(shapes, sort_keys=True)})
    return path


class SavedState:
    """The tensors in the directory of a saved learner.

    Args:
        directory: has one file, or those of all processes that wrote the state.

    Raises:
        RunError: a file is missing.
    """

    def __init__(self, directory: Path) -> None:
        self._files = state_files(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        with safe_open(self._files[0], framework="pt") as file:
            metadata = file.metadata() or {}
            if _SHAPES in metadata:
                self.shapes = {name: tuple(shape) for name, shape in json.loads(metadata[_SHAPES]).items()}
            else:
                names = list(file.keys())
                self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}

    def part(self, name: str, rank: int, size: int) -> Tensor:
        """Return the rows of a tensor that belong to one of `size` processes; a number as it is."""
        shape = self.shapes[name]
        if not shape:
            with safe_open(self._files[0], framework="pt") as file:
                number: Tensor = file.get_tensor(name)
                return number
        first, last = rows_of(shape[0], rank, size)
        pieces = []
        for i, path in enumerate(self._files):
            start, stop = rows_of(shape[0], i, len(self._files))
            low, high = max(first, start), min(last, stop)
            if low < high or i == 0:  # the first file gives an empty part its format
                with safe_open(path, framework="pt") as file:
                    pieces.append(file.get_slice(name)[max(low - start, 0) : max(high - start, 0)])
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def state_files(directory: Path) -> list[Path]:
    """Return the files of a saved learner's tensors, in the order of the processes that wrote them.

    Raises:
        RunError: a file is missing. Its rows would otherwise be those of the next file.
    """
    whole = directory / FILE
    if whole.exists():
        return [whole]
    there = sorted(directory.glob(PARTS))
    if not there:
        raise RunError(
            f"{str(directory)!r} has no state of the optimizer ({FILE} or {PARTS}); restore a good copy, or "
            "delete that directory to resume from the previous checkpoint"
        )
    writers = int(there[0].stem.rpartition("-")[2])
    expected = [directory / PART.format(i + 1, writers) for i in range(writers)]
    if there != expected:
        odd = sorted(path.name for path in {*there} ^ {*expected})
        raise RunError(
            f"{str(directory)!r} should have the parts of {writers} processes, but {odd[0]} is "
            f"{'missing' if directory / odd[0] in expected else 'one too many'}; use a directory that the "
            "machines of all processes share, or restore a good copy"
        )
    return there


def rows_of(count: int, rank: int, size: int) -> tuple[int, int]:
    """Return the first row of a process's part, and the row after its last, as FSDP divides rows."""
    step = -(-count // size)
    return min(rank * step, count), min((rank + 1) * step, count)
