"""The choice of `--compile auto` for all starts of a run."""

from __future__ import annotations

from typing import Literal

import torch

from palate.model.compiling import Compile, obstacle, settled
from palate.run.run import Run
from palate.world import current

FACT = "the choice of compiled sampling"


def settle_compiling(run: Run, option: Compile, tokens: int, device: torch.device) -> Literal["off", "on"]:
    """Return whether a run compiles its sampling: with `auto`, the choice of its first start.

    A start that cannot repeat this choice says so and samples plain, so its results are not bit-identical.
    Several processes make the same choice, since bits must not depend on the process that samples a row; a
    collective.

    Args:
        run: the run.
        option: the option.
        tokens: the most tokens that the run samples.
        device: the device that samples.

    Raises:
        ConfigError: the option is `on`, and an obstacle prevents compiling.
    """
    choice = _settled(run, option, tokens, device)
    if choice == "on":
        run.display.say("compiling the sampling step takes a few seconds, and none from torch's cache")
    return choice


def _settled(run: Run, option: Compile, tokens: int, device: torch.device) -> Literal["off", "on"]:
    if option != "auto":
        return settled(option, device, tokens)
    first = run.remember(FACT, _together(settled("auto", device, tokens)))
    now = _together(settled("auto", device, tokens, before=first))
    if now != first:
        reason = obstacle(device) or "another process cannot compile"
        run.display.say(
            f"the run started with compiled sampling, but {reason}; this start samples plain, so "
            "results will not be bit-identical"
        )
    return now


def _together(choice: Literal["off", "on"]) -> Literal["off", "on"]:
    """Return `on` if all processes choose it."""
    return "on" if set(current().gather("compiled sampling", choice)) == {"on"} else "off"
