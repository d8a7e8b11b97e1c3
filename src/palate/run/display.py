"""Live progress in a terminal or a notebook, or one line per step if the output is neither."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.console import Group as Stack
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from palate.metrics import STAGES, label
from palate.run.notebook import NotebookView
from palate.types import Completion, Group, Prompt

SHOWN = (
    ("objective/scores", "{:.3f}"),
    ("objective/scores_margin", "{:.3f}"),
    ("loss", "{:.4f}"),
    ("rewards/margins", "{:.3f}"),
    ("rewards/accuracies", "{:.0%}"),
    ("objective/kl", "{:.2f}"),
    ("completions/mean_length", "{:.1f}"),
    ("val/contain_eos_token", "{:.0%}"),
    ("pairs/dropped", "{:.0f}"),
    ("judge/verdicts", "{:.0f}"),
    ("judge/cost", "{:.4f}"),
    ("grad_norm", "{:.3f}"),
)
"""Metrics of the live view, with their formats."""

MANY_CUT = 0.2
"""Share of completions truncated at `max_new_tokens` from which the display warns."""

_BIDI = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
_UNSAFE = ("Cc", "Cs", "Co", "Cn", "Zl", "Zp")


def plain(text: str) -> str:
    """Return model text without characters that control the terminal or reverse the reading order."""
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if c in _BIDI or (unicodedata.category(c) in _UNSAFE and c not in "\n\t")
        else c
        for c in text
    )


class Display:
    """Shows the progress of a run.

    Args:
        console: output; standard error by default, since standard output is for results.
        quiet: show nothing.
        titled: begin a log with the run's name and directory, since the first step may be minutes away.

    Attributes:
        penalised: truncated completions get a lower reward, so the display does not warn about them.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False, titled: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet
        self.penalised = False
        self._titled = titled
        self._live: Live | NotebookView | None = None
        self._total = self._step = 0
        self._stage, self._speed = "starting", 0.0
        self._row: Mapping[str, float] = {}
        self._sample: tuple[Prompt, Completion, float | None] | None = None
        self._title = ""
        self._began = time.monotonic()
        self._reported_cut = False

    def start(self, method: str, directory: Path) -> None:
        """Start to show the run in `directory`."""
        self._title = plain(f"{method}  {directory}")
        self._began = time.monotonic()
        if not self.quiet and self.console.is_terminal:
            self._live = Live(self, console=self.console, refresh_per_second=4, transient=True)
        elif not self.quiet and self.console.is_jupyter:
            self._live = NotebookView(self.__rich__)
        if self._live is not None:
            self._live.start()
        elif self._titled:
            self.say(self._title)

    def stop(self) -> None:
        """Stop the live view."""
        self._stage, self._speed = "ended", 0.0
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str) -> None:
        """Print a line that stays on the screen."""
        if not self.quiet:
            self.console.print(Text(plain(text)), soft_wrap=True)

    def expect(self, steps: int) -> None:
        """Set the total number of steps."""
        self._total = steps

    def step(self, step: int) -> None:
        """Show the start of a step."""
        self._step = step
        self._refresh()

    def working(self, stage: str, speed: float) -> None:
        """Show the current stage of work and its speed in tokens (or completions) per second."""
        self._stage, self._speed = stage, speed
        self._refresh()

    def _tell_cut(self, row: Mapping[str, float]) -> None:
        """Warn once if many completions are truncated."""
        share = row.get("completions/clipped_ratio", 0.0)
        if share > MANY_CUT and not (self._reported_cut or self.penalised):
            self._reported_cut = True
            self.say(
                f"step {int(row['step'])}: {share:.0%} of the completions were truncated at max_new_tokens, "
                "so the reward saw only their beginnings; raise max_new_tokens, or penalise them with "
                "missing_eos_penalty"
            )

    def metrics(self, row: Mapping[str, float], samples: Sequence[Group]) -> None:
        """Show the metrics and a sample of a finished step."""
        self._row = row
        self._step = int(row["step"])
        self._tell_cut(row)
        if samples:
            group = samples[0]
            reward = None if group.rewards is None else group.rewards[0]
            self._sample = (group.prompt, group.completions[0], reward)
        self._refresh()
        if self._live is None and not self.quiet:
            shown = "  ".join(f"{label} {text}" for label, text in self._numbers())
            line = f"step {self._step}/{self._total}  {shown}  {row['step_time']:.1f} s"
            self.console.print(Text(line), soft_wrap=True)

    def __rich__(self) -> RenderableType:
        """Return the live view."""
        head = Table.grid(padding=(0, 2))
        unit = "completions" if self._stage == "annotate" else "tokens"
        speed = f"{self._speed:,.0f} {unit}/s" if self._speed else ""
        minutes, seconds = divmod(int(time.monotonic() - self._began), 60)
        head.add_row(
            Text(self._title, style="bold"),
            ProgressBar(total=max(1, self._total), completed=self._step, width=24),
            Text(f"step {self._step}/{self._total}"),
            Text(f"{STAGES.get(self._stage, self._stage)} {speed}", style="cyan"),
            Text(f"{minutes:02}:{seconds:02}", style="dim"),
        )
        numbers = Table.grid(padding=(0, 3))
        row = [Text.assemble((f"{label} ", "dim"), text) for label, text in self._numbers()]
        for start in range(0, len(row), 5):
            numbers.add_row(*row[start : start + 5])
        parts: list[RenderableType] = [head, numbers]
        if self._sample is not None:
            prompt, completion, reward = self._sample
            parts.append(Text.assemble((plain(prompt.text), "italic"), "\n", plain(completion.text)))
            if reward is not None:
                parts.append(Text(f"reward {reward:.2f}", style="dim"))
        return Panel(Stack(*parts), border_style="dim")

    def _refresh(self) -> None:
        if isinstance(self._live, NotebookView):  # a terminal is refreshed by a thread of its own
            self._live.refresh()

    def _numbers(self) -> list[tuple[str, str]]:
        return [(label(name), form.format(self._row[name])) for name, form in SHOWN if name in self._row]
