"""The choice of `--compile auto` for all starts of a run."""

from __future__ import annotations

from typing import Literal

import torch

from palate.model.compiling import Compile, obstacle, settled
from palate.run.run import Run
from palate.world import current

FACT = "the choice of compiled functions"


def settle_compiling(
    run: Run, option: Compile, device: torch.device, tokens: int | None = None
) -> Literal["off", "on"]:
    """Return whether a run uses compiled functions: with `auto`, the choice of its first start.

    A start that cannot repeat this choice says so and uses the plain way, so its results are not
    bit-identical. Several processes make the same choice, since bits must not depend on the process that
    samples a row; a collective.

    Args:
        run: the run.
        option: the option.
        device: the device of the model.
        tokens: the most tokens that the run samples; None for a training.

    Raises:
        ConfigError: the option is `on`, and an obstacle prevents compiling.
    """
    choice = _settled(run, option, device, tokens)
    if choice == "on":
        run.display.say("compiling takes a few seconds once, and none from torch's cache")
    return choice


def _settled(run: Run, option: Compile, device: torch.device, tokens: int | None) -> Literal["off", "on"]:
    if option != "auto":
        return settled(option, device, tokens)
    first = run.remember(FACT, _together(settled("auto", device, tokens)))
    now = _together(settled("auto", device, tokens, before=first))
    if now != first:
        reason = obstacle(device) or "another process cannot compile"
        run.display.say(
            f"the run started with compiled functions, but {reason}; this start computes without them, so "
            "results will not be bit-identical"
        )
    return now


def _together(choice: Literal["off", "on"]) -> Literal["off", "on"]:
    """Return `on` if all processes choose it."""
    return "on" if set(current().gather("compiled functions", choice)) == {"on"} else "off"
