"""Write src/palate/planning/measured.json, for `palate plan`, and the tables of docs/choosing.md.

python experiments/measured.py          # write both
python experiments/measured.py --check  # say if one is out of date
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from all_methods import ARMS, RESULTS, rows_of
from comparison import interval_of, mean_of, rows_of_one
from marks import missing, write
from palate.article import SOURCE

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "src" / "palate" / "planning" / "measured.json"
PAGE = ROOT / "docs" / "choosing.md"
SIGNS = {"yes": "O", "no": "X", "partly": "△"}


def main() -> None:
    rows = summaries()
    text = json.dumps(rows, indent=1) + "\n"
    parts = {"article": article(), "measured": measured(rows)}
    if sys.argv[1:] == ["--check"]:
        old = [str(FILE)] if FILE.read_text(encoding="utf-8") != text else []
        old += missing(PAGE, parts)
        sys.exit(f"out of date: {', '.join(old)}" if old else 0)
    FILE.write_text(text, encoding="utf-8")
    write(PAGE, parts)


def article() -> list[str]:
    """The article's table as Markdown."""
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
    """The measured rows as Markdown, the highest win rate first."""
    lines = ["| method | labels | win rate over the base | KL (nats) | seeds |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["win_rate"]):
        rate = f"{row['win_rate']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        lines.append(f"| `{row['method']}` | {row['labels']} | {rate} | {row['kl']:.1f} | {row['seeds']} |")
    return lines


def summaries() -> list[dict[str, Any]]:
    """A row per method and source of its labels: means over the seeds."""
    rows, found = rows_of(RESULTS), []
    for method in ARMS:
        for reward in ("data", "gold", "model"):
            own = rows_of_one(rows, method, reward)
            if not own:
                continue
            mean, (low, high) = partial(mean_of, own), interval_of(own)
            found.append(
                {
                    "method": method, "labels": reward, "win_rate": round(mean("win_rate"), 4),
                    "low": round(low, 4), "high": round(high, 4), "kl": round(mean("kl"), 2),
                    "seeds": len(own),
                }
            )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
