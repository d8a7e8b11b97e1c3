"""Write docs/comparison.md's tables and a paragraph on each method page from a run of `palate compare`.

python experiments/comparison.py                     # print the table
python experiments/comparison.py --from DIR --direct OTHER --write  # copy the numbers, write the documents
python experiments/comparison.py --write             # write the documents from the numbers copied earlier
python experiments/comparison.py --check             # name the documents that are out of date

`make compare` makes DIR, and OTHER, in which methods ask the annotator instead of a reward model. The numbers
are in experiments/results/comparison.json.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import comparison_rows
from marks import missing, write

ROOT = Path(__file__).resolve().parent.parent
Parts = dict[str, list[str]]
Row = Mapping[str, Any]

UNKNOWN = "—"
INTERVAL, JOINT = re.compile(r"\[-?[\d.]+, -?[\d.]+\]"), "\0"
"""An interval, and what stands for its space, at which no line ends."""
MODELS = {"smollm2": "SmolLM2-135M-Instruct"}
ANNOTATORS = {"sentiment": "VADER's sentiment"}
SOURCES = {
    "data": "data",
    "gold": "annotator",
    "own": "annotator, through its own reward model",
    "model": "reward model",
}
IN_WORDS = {
    "data": "It learnt from completions of the base model that the annotator had labelled",
    "gold": "It learnt from the annotator's rewards for its completions",
    "own": "It learnt from a reward model that it had trained on the annotator's labels",
    "model": "It learnt from a reward model that had been trained on the annotator's labels",
}


def main() -> None:
    """Print the table, copy the numbers, write the documents, or name those that are out of date."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="directory", type=Path, help="directory of a finished comparison")
    parser.add_argument("--direct", type=Path, help="directory of the comparison without a reward model")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.directory is not None:
        if not given.write:
            parser.error("--from needs --write")
        comparison_rows.write_rows(given.directory, given.direct)
    pages = documents(comparison_rows.rows())
    if given.write:
        for page, parts in pages.items():
            write(page, parts)
    elif given.check:
        old = [str(page.relative_to(ROOT)) for page, parts in pages.items() if missing(page, parts)]
        sys.exit(f"not what experiments/comparison.py writes: {', '.join(old)}" if old else 0)
    else:
        print("\n".join(table(comparison_rows.rows())))


def documents(result: Row) -> dict[Path, Parts]:
    """Return the marked parts of each document."""
    pages = {
        ROOT / "docs" / "methods" / f"{row['method']}.md": {"comparison": paragraph(result, row)}
        for row in result["methods"]
    }
    tables = {"comparison": [*table(result), "", *note(result)], "differences": differences(result)}
    return {ROOT / "docs" / "comparison.md": tables, **pages}


# ---- The table -------------------------------------------------------------------------------------


def table(result: Row) -> list[str]:
    """Return the measured columns as Markdown, the best mean reward first."""
    heads = [
        "method", "learns from", "learning rate", "reward", "win rate over the base", "by seed",
        "at equal length", "KL (nats)", "tokens each", "sampled tokens", "rewards asked for",
        "processor seconds",
    ]  # fmt: skip
    before = number(result["base"].get("reward"))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in ranked([*result["methods"], *result["direct"]]):
        cells = [
            f"`{row['name']}`", SOURCES[row["learns_from"]], power(row.get("lr")),
            f"{before} → {span(row, 'reward')}", span(row, "win_rate"), by_seed(row),
            number(row.get("length_controlled_win_rate")), number(row.get("kl"), ".1f"),
            number(row.get("tokens_each"), ".1f"), number(row.get("tokens"), ",.0f"),
            number(row.get("verdicts"), ",.0f"), number(row.get("cpu_seconds"), ".0f"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def ranked(methods: Sequence[Row]) -> list[Row]:
    """Return the methods, the best mean reward first; those without one last."""
    return sorted(methods, key=lambda row: (row.get("reward") is None, -(row.get("reward") or 0.0)))


def note(result: Row) -> list[str]:
    """Return what the intervals cover, and where and when the table was measured."""
    runs = f"Means over {seeds(result)}" if result["seeds"] > 1 else "One seed"
    learnt = (result.get("reward_model") or {}).get("pairs")
    shared = f"The reward model learnt from {learnt:,} pairs. " if learnt else ""
    return wrapped(
        f"{runs} on {result['test_prompts']} test prompts, with 95 % intervals that {covered(result)}. "
        f"{shared}{where(result)} ([numbers](../experiments/results/comparison.json))."
    )


def covered(result: Row) -> str:
    """Return which variation the intervals cover."""
    if result["seeds"] > 1:
        return "cover other prompts and other seeds"
    return "cover other prompts but not other seeds"


def where(result: Row) -> str:
    """Return machine and dates."""
    known = result["machine"]
    hardware = known.get("accelerator") or f"{known['processor']}, {known['cores']} cores"
    days = " to ".join(result["dates"])
    return f"{hardware} ({known['units']}), {known['dtype']}, torch {known['torch']}, {days}"


def seeds(result: Row) -> str:
    """Return the number of seeds in words."""
    return f"{result['seeds']} seed{'s' if result['seeds'] != 1 else ''}"


def number(value: float | None, form: str = ".2f") -> str:
    """Return a number, or a dash if it is unknown."""
    return UNKNOWN if value is None else format(value, form)


def power(value: float | None) -> str:
    """Return a small number as in 3e-4, or a dash if it is unknown."""
    if value is None:
        return UNKNOWN
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def span(row: Row, name: str, form: str = ".2f") -> str:
    """Return a mean with its interval, as far as they are known."""
    value, low, high = (row.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return number(value, form)
    return f"{number(value, form)} [{number(low, form)}, {number(high, form)}]"


def by_seed(row: Row) -> str:
    """Return the win rates of the seeds."""
    return " ".join(number(rate) for rate in row.get("win_rate_by_seed") or []) or UNKNOWN


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return the lines of a paragraph, or of an item of a list with an indent."""
    whole = INTERVAL.sub(lambda ends: ends[0].replace(" ", JOINT), text)
    lines = textwrap.wrap(
        whole, 118, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    return [line.replace(JOINT, " ") for line in lines]


# ---- Differences -----------------------------------------------------------------------------------


def differences(result: Row) -> list[str]:
    """Return which differences are clear: those to the base, and between methods by the better one."""
    base, rows = result["base"]["name"], result["differences"]
    if not rows:
        return ["One method alone has no differences."]
    clear = [better(row) for row in rows if row["clear"]]
    over_base = {high: text for high, low, text in clear if low == base}
    under_base = {low: text for high, low, text in clear if high == base}
    order = [row["name"] for row in ranked(result["methods"])]
    rest = [name for name in order if name not in {**over_base, **under_base}]
    between = [row for row in rows if base not in (row["one"], row["other"])]
    parts = [
        f"{len(clear)} of the {len(rows)} differences in mean reward are clear after Holm's correction.",
        against_base(over_base, under_base, rest, order),
        f"Between methods, {sum(row['clear'] for row in between)} of {len(between)} differences are clear"
        + (", each with its own 95 % interval:" if any(row["clear"] for row in between) else "."),
    ]
    lines = wrapped(" ".join(parts))
    items = []
    for name in order:
        beaten = [(low, text) for high, low, text in clear if high == name and low != base]
        if beaten:
            beaten.sort(key=lambda pair: order.index(pair[0]))
            listed = listing(f"`{low}` by {text}" for low, text in beaten)
            items += wrapped(f"- `{name}` has a higher mean reward than {listed}.", indent="  ")
    return [*lines, *([""] if items else []), *items, "", *wrapped(closing(result))]


def better(row: Row) -> tuple[str, str, str]:
    """Return the better and the worse method of a clear difference, and the difference with its interval."""
    high, low = (row["one"], row["other"]) if row["mean"] > 0 else (row["other"], row["one"])
    ends = sorted((abs(row["low"]), abs(row["high"])))
    return high, low, f"{abs(row['mean']):.2f} [{ends[0]:.2f}, {ends[1]:.2f}]"


def against_base(
    over: Mapping[str, str], under: Mapping[str, str], rest: Sequence[str], order: Sequence[str]
) -> str:
    """Return which methods differ from the model before training."""
    parts = []
    if over:
        listed = listing(f"`{name}` by {over[name]}" for name in order if name in over)
        count = f"{len(over)} method{'s have' if len(over) > 1 else ' has'}"
        parts.append(f"{count} a higher mean reward than the model before training: {listed}.")
    if under:
        listed = listing(f"`{name}` by {under[name]}" for name in order if name in under)
        count = f"{len(under)} method{'s have' if len(under) > 1 else ' has'}"
        parts.append(f"{count} a lower one: {listed}.")
    if rest:
        parts.append(
            f"These data do not separate {listing(f'`{name}`' for name in rest)} from the model before "
            "training."
        )
    return " ".join(parts)


def listing(items: Iterable[str]) -> str:
    """Return items joined by commas and, before the last one, by "and"."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def closing(result: Row) -> str:
    """Return the sentence of the comparison on what the uncertainty covers."""
    kept = [line for line in result["sentences"] if line.startswith("The uncertainty covers")]
    return kept[-1] if kept else f"The intervals {covered(result)}."


# ---- The method pages ------------------------------------------------------------------------------


def paragraph(result: Row, row: Row) -> list[str]:
    """Return one method's row in words."""
    settings, budget = result["settings"], result["budget"]
    rank = f", LoRA of rank {settings['lora_rank']}" if settings.get("lora_rank") else ""
    annotator = ANNOTATORS.get(result["annotator"], result["annotator"])
    text = (
        f"In the [comparison of {len(result['methods'])} methods](../comparison.md#the-methods-on-one-task) "
        f"({MODELS.get(result['model'], result['model'])}{rank}, {budget['amount']:,.0f} sampled "
        f"{budget['unit']} in completions of at most {settings['max_new_tokens']}, {annotator} as the "
        f"annotator), with {seeds(result)} and {result['test_prompts']} test prompts: mean reward "
        f"{number(result['base'].get('reward'))} → {span(row, 'reward')}, win rate over the base "
        f"{span(row, 'win_rate')}, {number(row.get('length_controlled_win_rate'))} at equal length, KL to "
        f"the base {number(row.get('kl'), '.1f')} nats, {number(row.get('tokens_each'), '.0f')} tokens per "
        "answer. "
        f"{IN_WORDS[row['learns_from']]}, {rate(row)}. "
        f"{usage(row)}{without_model(result, row)}The intervals {covered(result)}. {where(result)}."
    )
    return wrapped(text)


def without_model(result: Row, row: Row) -> str:
    """Return the method's numbers from the annotator itself, with a space after them; or an empty text."""
    own = next((one for one in result["direct"] if one["method"] == row["method"]), None)
    if own is None:
        return ""
    return (
        f"From the annotator itself, with a learning rate of {power(own.get('lr'))}: mean reward "
        f"{span(own, 'reward')}, win rate {span(own, 'win_rate')}, KL {number(own.get('kl'), '.1f')} nats. "
    )


def usage(row: Row) -> str:
    """Return the processor time in words, if it is known, with a space after it."""
    seconds = row.get("cpu_seconds")
    return "" if seconds is None else f"A run took {number(seconds, '.0f')} seconds of processor time. "


def rate(row: Row) -> str:
    """Return the learning rate in words, with those that the search tried."""
    chosen = f"with a learning rate of {power(row.get('lr'))}"
    others = [power(float(name)) for name in row.get("tried") or {} if float(name) != row.get("lr")]
    return chosen + (f" (also tried: {', '.join(others)})" if others else "")


if __name__ == "__main__":
    main()
