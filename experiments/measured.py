"""Write src/palate/planning/measured.json, for `palate plan`, and the tables of docs/choosing.md.

python experiments/measured.py          # write both
python experiments/measured.py --check  # name what is out of date

The numbers are those that experiments/comparison.py copied from a run of `palate compare`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comparison_rows
from marks import missing, write
from palate.article import SOURCE

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "src" / "palate" / "planning" / "measured.json"
PAGE = ROOT / "docs" / "choosing.md"
SIGNS = {"yes": "O", "no": "X", "partly": "△"}
LABELS = {"data": "data", "gold": "gold", "own": "gold", "model": "model"}
"""Labels of a row by the source that experiments/comparison_rows.py names. A method that trains its own
reward model asks the annotator for its labels."""
NEEDED = ("win_rate", "win_rate_low", "win_rate_high", "kl")
"""Numbers without which a row ranks nothing."""


def main() -> None:
    """Write the file and the tables, or name what is out of date."""
    rows = summaries(comparison_rows.rows())
    text = json.dumps(rows, indent=1) + "\n"
    parts = {"article": article(), "measured": measured(rows)}
    if sys.argv[1:] == ["--check"]:
        old = [FILE.name] if FILE.read_text(encoding="utf-8") != text else []
        old += missing(PAGE, parts)
        sys.exit(f"out of date: {', '.join(old)}" if old else 0)
    FILE.write_text(text, encoding="utf-8")
    write(PAGE, parts)


def article() -> list[str]:
    """Return the article's table as Markdown."""
    lines = [
        "| method | no human preferences | unbiased data | online feedback | no external API | models |",
        "|---|---|---|---|---|---|",
    ]
    for name, cells in SOURCE.items():
        answers = (
            cells.no_human_preferences, cells.unbiased_data, cells.online_feedback, cells.no_external_api
        )  # fmt: skip
        lines.append(f"| `{name}` | {' | '.join(SIGNS[one] for one in answers)} | {cells.models} |")
    return lines


def measured(rows: list[dict[str, Any]]) -> list[str]:
    """Return the measured rows as Markdown, the highest win rate first."""
    lines = ["| method | labels | win rate over the base | KL (nats) | seeds |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["win_rate"]):
        rate = f"{row['win_rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"| `{row['method']}` | {row['labels']} | {rate} | {row['kl']:.1f} | {row['seeds']} |")
    return lines


def summaries(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each method and source of its labels whose numbers are known."""
    return [
        {
            "method": row["method"],
            "labels": LABELS[row["learns_from"]],
            "win_rate": round(row["win_rate"], 4),
            "low": round(row["win_rate_low"], 4),
            "high": round(row["win_rate_high"], 4),
            "kl": round(row["kl"], 2),
            "seeds": len(row["seeds"]),
        }
        for row in (*result["methods"], *result["direct"])
        if all(row.get(name) is not None for name in NEEDED)
    ]


if __name__ == "__main__":
    main()
