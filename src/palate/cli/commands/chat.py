"""`palate chat`: talk in the terminal to the model that a run trained, and to the model before training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from palate.cli.command import Command
from palate.config import ModelConfig, RunConfig, Sampling
from palate.rundir import read_description


class ChatConfig(Sampling):
    """Chat"""

    unoffered: ClassVar = frozenset({"run", "sampling_rows"})
    """Fields without a flag: `run` is the command's first word; single rows need no `sampling_rows`."""

    run: Path
    """Directory of the run, such as runs/oaif."""
    step: int | None = Field(None, ge=0)
    """Step of the checkpoint to chat with; default: the last checkpoint."""
    only: Literal["checkpoint", "base"] | None = None
    """Chat with only one of the two models: the trained one (`checkpoint`) or the one before training
    (`base`). Default: both."""
    temperature: float = Field(0.7, ge=0)
    max_new_tokens: int = Field(256, ge=1)
    seed: int = Field(RunConfig.model_fields["seed"].default, ge=0)
    """Random seed for sampling."""
    device: str | None = None
    """Device of the models: `cpu`, `cuda` or `cuda:1`; default: the device of the run."""
    trust_remote_code: bool = ModelConfig.model_fields["trust_remote_code"].default
    """Run Python code that comes with the model. Such code can do anything on this machine. If the run
    needed this flag, give it again here."""


def chat(config: ChatConfig) -> int:
    """Answer turn by turn until the input ends."""
    read_description(config.run)  # a wrong directory is reported before torch is loaded

    from rich.console import Console

    from palate.cli.speakers import speakers
    from palate.cli.talk import Chat, busy, piped, typed
    from palate.quiet import quiet_libraries

    quiet_libraries()
    notes = Console(stderr=True)
    with busy(notes, "loading"):
        models = speakers(
            config.run,
            step=config.step,
            only=config.only,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
        )
    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    talk = Chat(models, config, Console(), notes, interactive=interactive)
    if interactive:
        talk.greet()
    for line in typed(talk.note) if interactive else piped():
        if not talk.take(line):
            break
    return 0


COMMAND = Command(
    name="chat",
    help="Chat with the model that a run trained, and with the model before training.",
    call=chat,
    config=ChatConfig,
    first="run",
    usage="Usage: palate chat RUN [OPTIONS]",
    order=1,
)
