"""The results of a finished run, shown in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from palate.errors import PalateError
from palate.evaluate import Evaluation
from palate.launch import Outcome
from palate.run import plain

QUESTION = "How was your day?"
"""Asked in an example of a command."""

BESIDE = 3
"""Number of prompts shown with both completions at the end of a run."""


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Write the report, then print the measurements and the paths of checkpoint, summary and report."""
    if "accuracy_after" in outcome.summary:
        show_accuracy(outcome.summary, console)
    if "loss_after" in outcome.summary:
        before, after = (outcome.summary[f"loss_{when}"] for when in ("before", "after"))
        console.print(f"\nheld-out loss ({outcome.summary['held_out']})  {before:.4f} -> {after:.4f}")
    if outcome.evaluation is not None:
        show_evaluation(outcome.evaluation, console)
    directory = outcome.run.directory
    console.print(Text(plain(f"\ncheckpoint  {directory / outcome.summary['checkpoint']}")), soft_wrap=True)
    console.print(Text(plain(f"summary     {directory / 'summary.json'}")), soft_wrap=True)
    show_report(directory, console)
    if outcome.evaluation is not None:
        show_next(directory, console)


def show_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print a table of measurements before and after training, and some prompts with both completions."""
    table = Table(title=f"held-out prompts ({evaluation.compared})", title_justify="left", pad_edge=False)
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("mean reward", f"{evaluation.reward_before:.3f}", f"{evaluation.reward_after:.3f}")
    interval = f"{evaluation.win_rate:.3f} [{evaluation.win_rate_low:.3f}, {evaluation.win_rate_high:.3f}]"
    table.add_row("win rate against before, 95 % interval", "", interval)
    table.add_row("KL from before (nats per completion)", "", f"{evaluation.kl:.2f}")
    table.add_row("mean length (tokens)", f"{evaluation.length_before:.1f}", f"{evaluation.length_after:.1f}")
    table.add_row("share not truncated", f"{evaluation.eos_before:.2f}", f"{evaluation.eos_after:.2f}")
    console.print()
    console.print(table)
    for old, new in list(zip(evaluation.before, evaluation.after, strict=True))[:BESIDE]:
        console.print()
        console.print(Text(plain(old.prompt.text), style="bold italic"))
        for label, group in (("before", old), ("after", new)):
            reward = group.rewards[0] if group.rewards else None
            score = "" if reward is None else f" ({reward:+.2f})"
            console.print(Text.assemble((f"{label}{score}  ", "cyan"), plain(group.completions[0].text)))


def show_accuracy(summary: Mapping[str, Any], console: Console) -> None:
    """Print the share of held-out pairs whose chosen completion gets the higher reward."""
    interval = "{accuracy_after:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]".format(**summary)
    table = Table(title=f"held-out pairs ({summary['held_out_pairs']})", title_justify="left", pad_edge=False)
    for column in ("", "before", "after, 95 % interval"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("accuracy", f"{summary['accuracy_before']:.3f}", interval)
    for label, cells in _quality(summary):
        table.add_row(label, *cells)
    console.print()
    console.print(table)


def _quality(summary: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield further rows for a reward model: a label, and the values before and after."""
    if "accuracy_shorter_after" in summary:
        interval = "{accuracy_shorter_after:.3f} [{accuracy_shorter_low:.3f}, {accuracy_shorter_high:.3f}]"
        label = f"accuracy where chosen is shorter ({summary['shorter_pairs']} pairs)"
        yield label, (f"{summary['accuracy_shorter_before']:.3f}", interval.format(**summary))
    if "ece_after" in summary:
        yield "calibration error (ECE)", (f"{summary['ece_before']:.3f}", f"{summary['ece_after']:.3f}")
        yield "accuracy of always preferring the longer", ("", f"{summary['longer_wins']:.3f}")


def show_report(directory: Path, console: Console) -> None:
    """Write the run's report and print its path; warn if it cannot be written, since training succeeded."""
    from palate.report import write_report

    try:
        report = write_report([directory])
    except (PalateError, OSError) as error:
        line = Text(plain(f"palate: the run has finished, but its report cannot be written: {error}"))
        Console(stderr=True).print(line, soft_wrap=True)
    else:
        link = Path(report).resolve().as_uri()  # which terminals make clickable
        console.print(Text.assemble("report      ", (plain(str(report)), f"link {link}")), soft_wrap=True)


def show_next(directory: Path, console: Console) -> None:
    """Two commands to try on what was trained."""
    console.print(Text("\ntry next"), soft_wrap=True)
    for command in (
        f"palate chat {directory}",
        f"palate sample --model {directory} --prompt {QUESTION!r} --n 3",
    ):
        console.print(Text(plain(f"    {command}")), soft_wrap=True)
