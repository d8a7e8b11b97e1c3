"""Write src/palate/planning/measured.json: the measured comparison of methods, for `palate plan`.

python experiments/measured.py          # write the file
python experiments/measured.py --check  # say if it is out of date
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from all_methods import ARMS, RESULTS, rows_of
from comparison import interval_of, mean_of, rows_of_one

PAGE = Path(__file__).resolve().parent.parent / "src" / "palate" / "planning" / "measured.json"


def main() -> None:
    text = json.dumps(summaries(), indent=1) + "\n"
    if sys.argv[1:] == ["--check"]:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE} is out of date")
    PAGE.write_text(text, encoding="utf-8")


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
