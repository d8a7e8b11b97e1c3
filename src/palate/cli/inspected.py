"""An inspection of data, shown in the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from palate.data import Account
from palate.data.account import QUANTILES, quantiles
from palate.inspection import NAMES, InspectedRow, Inspection
from palate.loops import REPEATED
from palate.model import Codec
from palate.run import plain

PROMPT, LEARNT, CUT, LABEL = "cyan", "bold green", "red strike", "dim"
"""The styles of a prompt, of what is learnt, of what is cut off, and of labels."""


def show_inspection(
    inspection: Inspection, codec: Codec, source: str, rows: int, console: Console, *, room: int = 1
) -> None:
    """Print the figures of all rows, then the first rows with the parts in colour.

    Args:
        inspection: the rows.
        codec: the tokenizer that they were read with.
        source: the name of the data.
        rows: the number of rows to print.
        console: the output.
        room: tokens that the method samples after a prompt.
    """
    console.print(Text(plain(f"{source}, read as {inspection.kind}, in the tokens of {codec.name}\n")))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style=LABEL, no_wrap=True)
    facts.add_column(overflow="fold")
    for label, text in _facts(inspection, codec, room):
        facts.add_row(label, Text(plain(text)))
    console.print(facts)
    console.print()
    console.print(_lengths(inspection))
    if rows and console.is_terminal:
        console.print()
        console.print(Text("prompt", PROMPT), Text("learnt", LEARNT), Text("cut off", CUT))
    for row in inspection.rows[:rows]:
        _show_row(row, inspection, console)


def _facts(inspection: Inspection, codec: Codec, room: int) -> Iterator[tuple[str, str]]:
    """Yield labels and texts."""
    account, total = inspection.account, len(inspection.rows)
    yield "rows", next(account.overview())
    for reason, count in account.reasons.most_common():
        example = next((row.message for row in account.skipped if row.reason == reason), "")
        yield "skipped", f"{count:,} x {reason}: {example}"
    for reason, tally in account.dropped.items():
        yield "left out", f"{tally}: {reason}"
    for name, tally in account.unused.items():
        reader = ", unless a reward function reads it" if inspection.kind == "prompts" else ""
        yield "not used", f"{name} ({tally}){reader}"
    cut = [row for row in inspection.rows if row.cut]
    limit = f"{codec.max_length:,} tokens (--max-length)"
    yield (
        "cut",
        f"{_of(cut, total)} have an answer beyond {limit}" if cut else f"no row is longer than {limit}",
    )
    full = [row for row in inspection.rows if row.tokens + room > codec.max_length]
    if full and inspection.kind == "prompts":
        advice = "a run skips them; shorten them or lower --max-new-tokens"
        yield "no room", f"{_of(full, total)} leave no room for {room:,} new tokens: {advice}"
    repeats = account.notes.get(REPEATED)
    yield "repeats", f"{repeats}, the same as an earlier row" if repeats else "no row repeats an earlier one"
    yield "end", f"{codec.decode([codec.end_id])} closes a completion from data"
    yield "template", _template(inspection, codec)
    yield from _notes(account)


def _template(inspection: Inspection, codec: Codec) -> str:
    if not codec.has_template:
        return "the model has no chat template"
    if inspection.kind == "prompts":
        return "prompts are what the chat template renders"
    others = [row for row in inspection.rows if not row.matches]
    if not others:
        return "prompt and completion are the tokens of the chat template's own rendering in every row"
    return f"{_of(others, len(inspection.rows))} have other tokens than the chat template's own rendering"


def _of(rows: list[InspectedRow], total: int) -> str:
    return f"{len(rows):,} of {total:,} rows (the first is {rows[0].prompt.where})"


def _notes(account: Account) -> Iterator[tuple[str, str]]:
    for text, tally in account.notes.items():
        if text != REPEATED:
            yield "note", f"{text} ({tally})"


def _lengths(inspection: Inspection) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("tokens", style=LABEL)
    for name in QUANTILES:
        table.add_column(name, justify="right")
    for name, lengths in inspection.lengths().items():
        table.add_row(name, *(f"{tokens:,}" for tokens in quantiles(lengths).values()))
    return table


def _show_row(row: InspectedRow, inspection: Inspection, console: Console) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=LABEL, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(plain(row.text), PROMPT))
    for name, answer in zip(NAMES[inspection.kind], row.shown, strict=True):
        grid.add_row(name, Text(plain(answer.learnt), LEARNT))
        if answer.cut:
            grid.add_row("cut off", Text(plain(answer.cut), CUT))
    console.print()
    sizes = [f"prompt {row.tokens:,}"]
    sizes += [
        f"{name} {answer.tokens:,}" for name, answer in zip(NAMES[inspection.kind], row.shown, strict=True)
    ]
    match = "" if row.matches else "; not the chat template's tokens"
    console.print(Text(plain(f"{row.prompt.where}  tokens: {', '.join(sizes)}{match}"), "bold"))
    console.print(grid)
