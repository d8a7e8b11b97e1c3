"""The option `--compile`: obstacles to compiling, and the choice of `auto`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from functools import cache
from typing import Literal

import torch

from palate.errors import ConfigError

log = logging.getLogger("palate")

Compile = Literal["off", "auto", "on"]

ENOUGH_TOKENS = 20_000
"""Number of sampled tokens from which `auto` compiles. Compiling takes some three seconds, and saves about a
millisecond for each token of a small model (docs/performance.md)."""


def settled(
    option: Compile, device: torch.device, tokens: int | None = None, *, before: str | None = None
) -> Literal["off", "on"]:
    """Return the choice for a piece of work: the option itself, or the choice of `auto`.

    Args:
        option: the option.
        device: the device of the model.
        tokens: the most tokens that the work samples; None for a training, which is long enough.
        before: the choice of an earlier start of the same work, which `auto` repeats if it can.

    Raises:
        ConfigError: the option is `on`, and an obstacle prevents compiling.
    """
    if option == "off" or (option == "auto" and before == "off"):
        return "off"
    short = tokens is not None and tokens < ENOUGH_TOKENS
    if option == "auto" and before is None and (device.type != "cpu" or short):
        return "off"
    reason = obstacle(device)
    if reason is None:
        return "on"
    if option == "on":
        raise ConfigError(f"compile is on, but {reason}; or leave --compile out")
    return "off"


def obstacle(device: torch.device) -> str | None:
    """Return why nothing can be compiled here, with advice; None without an obstacle."""
    if device.type != "cpu":
        return f"the model is on {device}, and only work on a CPU is compiled; use --device cpu"
    return _without_compiler() or _without_cache()


@cache
def _without_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except (RuntimeError, OSError, subprocess.SubprocessError):  # each system has errors of its own
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return (
            f"torch finds no C++ compiler ({os.environ.get('CXX', usual)}); install one, or name it in the "
            "environment variable CXX"
        )
    return None


def _without_cache() -> str | None:
    """Return a sentence about a directory of compiled code that is not safe or cannot be written."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    advice = "name another directory in the environment variable TORCHINDUCTOR_CACHE_DIR"
    try:
        place = cache_dir()
        # torch runs code that it finds there.
        about, link = os.stat(place), os.lstat(place)
    except (OSError, KeyError) as error:
        return f"torch has no directory for compiled code ({error}); {advice}"
    if hasattr(os, "getuid") and ({about.st_uid, link.st_uid} != {os.getuid()} or about.st_mode & 0o002):
        return f"others may write into torch's directory of compiled code, {place!r}; {advice}"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"torch's directory of compiled code, {place!r}, cannot be written; {advice}"
    return None


@cache
def say_plain(sentence: str) -> None:
    """Log once that something is not compiled although it should be."""
    log.warning(sentence)
