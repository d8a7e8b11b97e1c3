"""The choice of `--compile auto` for all starts of a run."""

from __future__ import annotations

from typing import Literal

import torch

from palate.model.compiling import Compile, obstacle, settled
from palate.run.run import Run

FACT = "the choice of compiled sampling"


def settle_compiling(run: Run, option: Compile, tokens: int, device: torch.device) -> Literal["off", "on"]:
    """Return whether a run compiles its sampling: with `auto`, the choice of its first start.

    A start that cannot repeat this choice says so and samples plain, so its results are not bit-identical.

    Args:
        run: the run.
        option: the option.
        tokens: the most tokens that the run samples.
        device: the device that samples.

    Raises:
        ConfigError: the option is `on`, and an obstacle prevents compiling.
    """
    if option != "auto":
        return settled(option, device, tokens)
    first = run.remember(FACT, settled("auto", device, tokens))
    now = settled("auto", device, tokens, before=first)
    if now != first:
        run.display.say(
            f"the run started with compiled sampling, but {obstacle(device)}; this start samples plain, so "
            "results will not be bit-identical"
        )
    return now
