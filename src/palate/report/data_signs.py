"""Warnings about a run's data, from the account in `config.json`."""

from __future__ import annotations

from palate.data.account import MOSTLY_TRUNCATED, TRUNCATED
from palate.report.sign import Sign
from palate.report.words import count, percent
from palate.rundir import RunRecord

TRUNCATED_WORRY = 0.5
"""Share of rows with a truncated answer for a worry; above `MOSTLY_TRUNCATED` it is a note."""


def data_truncated(run: RunRecord) -> Sign | None:
    """Check for data whose answers are mostly longer than the model's context."""
    accounts = run.description.get("data")
    shares = []
    for source, account in accounts.items() if isinstance(accounts, dict) else ():
        if not isinstance(account, dict):
            continue
        used, notes = account.get("used"), account.get("notes") or {}
        rows = sum(note["rows"] for text, note in notes.items() if text.startswith(TRUNCATED))
        if used and rows:
            shares.append((rows / used, source, rows, used))
    share, source, rows, used = max(shares, default=(0.0, "", 0, 0))
    if share <= MOSTLY_TRUNCATED:
        return None
    return Sign(
        "data_truncated",
        "worry" if share > TRUNCATED_WORRY else "note",
        "Many answers of the data are truncated",
        f"{source}: in {count(rows)} of {count(used)} rows ({percent(min(1.0, share))}), an answer does not "
        "fit the context and is learnt without its end.",
        "The model learns the beginnings of these answers and not where they end. Of a pair, only what fits "
        "is compared.",
        "Raise --max-length, if the model and the memory allow it; or shorten or drop the long rows. "
        "`palate inspect` shows the lengths.",
    )
