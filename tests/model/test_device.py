import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from palate.config import ModelConfig
from palate.errors import ConfigError, ModelError
from palate.given import GivenModel
from palate.model import device, load_model
from palate.model.device import has_bfloat16, require_apart, resolve

CPU = torch.device("cpu")

UNITS = pytest.mark.parametrize(
    ("amx", "avx512", "arm"),
    [(False, False, False), (True, False, False), (False, True, False), (False, False, True)],
    ids=["none", "amx", "avx512", "arm"],
)

SetUnits = Callable[[bool, bool, bool], None]


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> SetUnits:
    """Sets the units of the CPU, and puts the real check for them back."""

    def set_units(amx: bool, avx512: bool, arm: bool) -> None:
        monkeypatch.setattr(device, "has_bfloat16", has_bfloat16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": arm}, raising=False)

    return set_units


def config(dtype: str, model: str = "smollm2") -> ModelConfig:
    return ModelConfig.model_validate({"model": model, "dtype": dtype, "device": "cpu"})


@UNITS
def test_bfloat16_is_refused_on_a_cpu_without_units(
    amx: bool, avx512: bool, arm: bool, units: SetUnits, tiny: str
) -> None:
    units(amx, avx512, arm)
    if amx or avx512 or arm:
        assert load_model(config("bfloat16", tiny)).dtype == torch.bfloat16
        return
    with pytest.raises(ModelError) as caught:
        load_model(config("bfloat16", tiny))
    assert "dtype is bfloat16, but this CPU has no units for it" in str(caught.value)
    assert str(caught.value).endswith("use --dtype float32")


@UNITS
def test_auto_is_bfloat16_on_x86_with_units(
    amx: bool, avx512: bool, arm: bool, units: SetUnits, tiny: str
) -> None:
    units(amx, avx512, arm)
    expected = torch.bfloat16 if amx or avx512 else torch.float32
    assert load_model(config("auto", tiny)).dtype == expected


def test_float32_is_never_refused(units: SetUnits) -> None:
    units(False, False, False)
    assert resolve(config("float32")) == (CPU, torch.float32)


def test_a_torch_that_lists_no_features(units: SetUnits, monkeypatch: pytest.MonkeyPatch) -> None:
    units(False, False, False)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not has_bfloat16(CPU)


def test_other_devices_are_not_refused(units: SetUnits) -> None:
    units(False, False, False)
    assert has_bfloat16(torch.device("meta"))


def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be used"):
        resolve(ModelConfig(device="mps"))


def test_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    two = SimpleNamespace(size=2)
    monkeypatch.setattr("palate.model.device.current", lambda: two)
    with pytest.raises(ModelError, match="device is 'cuda:1', and all 2 processes would share it"):
        resolve(ModelConfig(device="cuda:1"))


@pytest.mark.parametrize("own", [0, 1])
def test_a_given_model_is_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch, own: int) -> None:
    monkeypatch.setattr(device, "current", lambda: SimpleNamespace(size=2, rank=own))
    monkeypatch.setattr(device, "place_of", lambda *_: (torch.device("cuda:1"), "float32"))
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: own)
    cfg = ModelConfig(model=GivenModel(SimpleNamespace(name_or_path="mine")))
    if own == 1:
        assert resolve(cfg) == (torch.device("cuda:1"), torch.float32)
        return
    with pytest.raises(ModelError, match="is on cuda:1 in process 0 of 2, whose GPU is cuda:0; move it to"):
        resolve(cfg)


class Gathered:
    """A world in which the other processes have these values."""

    def __init__(self, *others: Any) -> None:
        self.others, self.size = others, 1 + len(others)

    def gather(self, name: str, value: Any) -> list[Any]:
        return [value, *self.others]


def test_two_processes_with_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, host = torch.device("cuda"), socket.gethostname()
    monkeypatch.setattr(device, "_identity", lambda _: "GPU-1")
    for others, processes in (([host, "GPU-1"],), 1), (([host, "GPU-2"], [host, "GPU-2"]), 2):
        monkeypatch.setattr(device, "current", lambda others=others: Gathered(*others))
        with pytest.raises(ConfigError, match=f"use --processes {processes}, or --device cpu"):
            require_apart(gpu)
        require_apart(CPU)
    monkeypatch.setattr(device, "current", lambda: Gathered([host, "GPU-2"], ["other", "GPU-1"]))
    require_apart(gpu)


def test_the_smallest_gpu_decides_about_sharding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "current", lambda: Gathered(40, 60))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80))
    assert device.least_memory(torch.device("cuda")) == 40


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cdua", "such as cuda:1; did you mean cuda?"),
        ("cdua:1", "such as cuda:1; did you mean cuda:1?"),
        ("warp", "device 'warp' is unknown, expected auto, cpu, cuda or cuda:N, such as cuda:1"),
        ("cuda:x", "device 'cuda:x' is unknown, expected auto, cpu, cuda or cuda:N, such as cuda:1"),
    ],
)
def test_an_unknown_device(name: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(ModelConfig(device=name))
    assert str(caught.value).endswith(message)
