"""The accounts of a run's data sets, as files of the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from palate.data import Account, write_rows
from palate.run.directory import RunDirectory
from palate.run.following import Place
from palate.rundir.writing import writing


def write_accounts(place: Place, accounts: Mapping[str, Account]) -> None:
    """Write the accounts to `config.json`, and the skipped rows to `skipped.jsonl`.

    Args:
        place: the run's directory; nothing is written in a process that does not own it.
        accounts: an account per data set, by its name.

    Raises:
        RunError: a file cannot be written.
    """
    if not isinstance(place, RunDirectory):
        return
    with writing(place.path / "config.json"):
        place.add("data", {name: account.summary() for name, account in accounts.items()})
    rows = [asdict(row) for account in accounts.values() for row in account.skipped]
    if rows:
        write_rows(place.path / "skipped.jsonl", rows)


def warnings(accounts: Mapping[str, Account]) -> list[str]:
    """Return the lines on the data that are worth repeating at the end of a run."""
    return [f"{source}: {line}" for source, account in accounts.items() for line in account.warnings()]
