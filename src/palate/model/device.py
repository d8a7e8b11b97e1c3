"""The device and the number format of a model."""

from __future__ import annotations

import socket
from typing import Any

import torch

from palate.config import ModelConfig
from palate.errors import ConfigError, ModelError
from palate.given import GivenModel
from palate.model.given import place_of
from palate.near import near
from palate.world import current


def resolve(cfg: ModelConfig) -> tuple[torch.device, torch.dtype]:
    """Return the device and the number format of a configuration, with `auto` resolved for this machine.

    A model that is given as a Python object keeps its own.

    Raises:
        ModelError: the device is not available, or dtype is bfloat16 on a CPU without bfloat16 units.
    """
    device = torch.device(_device(cfg.device))
    dtype = cfg.dtype
    if isinstance(cfg.model, GivenModel):
        device, dtype = place_of(cfg.model, cfg)
        _device(device.type)  # it may be one that cannot be used
        _check_own(device, cfg.model)
    if dtype == "auto":
        return device, torch.bfloat16 if prefers_bfloat16(device) else torch.float32
    if dtype == "float32":
        return device, torch.float32
    if not has_bfloat16(device):
        raise ModelError(
            "dtype is bfloat16, but this CPU has no units for it (AVX512-BF16, AMX or ARM bf16), so it would "
            "be several times slower than float32; use --dtype float32"
        )
    return device, torch.bfloat16


def _check_own(device: torch.device, model: GivenModel) -> None:
    """Raise ModelError if a model is on the GPU of another process."""
    world = current()
    if device.type == "cuda" and world.size > 1 and device.index != (own := torch.cuda.current_device()):
        raise ModelError(
            f"model {model!s} is on {device} in process {world.rank} of {world.size}, whose GPU is "
            f"cuda:{own}; move it to cuda:LOCAL_RANK, the number that the launcher sets in the environment"
        )


def require_apart(device: torch.device) -> None:
    """Check that each process has a GPU of its own, since NCCL accepts no two on one; a collective.

    Raises:
        ConfigError: some share a GPU.
    """
    world = current()
    if device.type != "cuda" or world.size == 1:
        return
    names = world.gather("devices", [socket.gethostname(), _identity(device)])
    apart = len({tuple(name) for name in names})
    if apart < len(names):
        raise ConfigError(
            f"{len(names)} processes have {apart} {'GPU' if apart == 1 else 'GPUs'} between them, and each "
            f"needs one of its own; use --processes {apart}, or --device cpu"
        )


def _identity(device: torch.device) -> str:
    """Return the number that a GPU has from its maker."""
    return str(torch.cuda.get_device_properties(device).uuid)


def least_memory(device: torch.device) -> int:
    """Return the memory of the smallest GPU of all processes, in bytes; a collective."""
    own = torch.cuda.get_device_properties(device).total_memory
    return min(current().gather("device memory", int(own)))


def prefers_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is the faster format: on recent GPUs, and on x86 CPUs with units for it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def has_bfloat16(device: torch.device) -> bool:
    """Return whether bfloat16 is allowed: False only for a CPU without bfloat16 units.

    Tests replace this function to compute in bfloat16 on every CPU.
    """
    return device.type != "cpu" or prefers_bfloat16(device) or bool(_capabilities().get("bf16"))


def _capabilities() -> dict[str, Any]:
    """Return the CPU's features; empty if this version of torch cannot list them."""
    listed = getattr(torch.cpu, "get_capabilities", dict)
    return dict(listed())


def _device(name: str) -> str:
    if name.startswith("mps"):
        raise ModelError(f"device {name!r} cannot be used, since sampling needs float64; use --device cpu")
    if name.startswith("cuda:") and current().size > 1:
        raise ModelError(
            f"device is {name!r}, and all {current().size} processes would share it; leave --device out, so "
            "that each process uses a GPU of its own"
        )
    if name != "auto":
        try:
            torch.device(name)
        except RuntimeError as error:
            kind, colon, number = name.partition(":")
            meant = near(kind, ("auto", "cpu", "cuda"))
            advice = f"; did you mean {meant}{colon}{number}?" if meant not in (None, kind) else ""
            raise ModelError(
                f"device {name!r} is unknown, expected auto, cpu, cuda or cuda:N, such as cuda:1{advice}"
            ) from error
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"device {name!r} is not available: {reason}; use --device auto or cpu"
            ) from error
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
