"""Set up before torch is used: one thread a worker, nothing fetched, no library chatter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from palate.cli.actions import quiet_libraries
from palate.learn import Policy
from palate.testing import tiny_model, tiny_policy

torch.set_num_threads(1)
quiet_libraries()


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_everywhere() -> Iterator[None]:
    """Let tests compute in bfloat16 on a CPU without units for it, where it is slow but right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palate.model.device.has_bfloat16", lambda device: True)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random two-layer Llama over bytes, with a chat template."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), chat=True)


@pytest.fixture(scope="session")
def tiny_plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def make_policy(tiny: str) -> Callable[..., Policy]:
    """Policies over the tiny model; options as for `tiny_policy`."""

    def make(**options: object) -> Policy:
        return tiny_policy(Path(tiny), **options)  # type: ignore[arg-type]

    return make
