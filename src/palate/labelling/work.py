"""Label a data set: read, annotate in slices, write one file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from palate.annotate.judges.ledger import Ledger
from palate.annotate.judges.records import Amount
from palate.config import DataConfig, RewardConfig
from palate.data import Account, check_target, write_rows
from palate.errors import ConfigError, RunError
from palate.journal import Journal
from palate.labelling.annotators import Labeller, Labels, labeller
from palate.labelling.items import Item, read_items
from palate.labelling.rows import best_worst_row, clashes, completion_row, pair_row

SLICE = 64
"""Rows to annotate between two reports of progress."""

JOURNAL = ".journal.db"
"""Ends the name of the file beside the output that stores verdicts and rewards."""


@dataclass(frozen=True)
class Counts:
    """The result of an annotation.

    Attributes:
        output: the labelled file.
        rows: rows of the file.
        labelled, ties, unusable: rows with a label, with equal rewards, and without a usable reward.
        unpaired: prompts without a pair, because they have fewer than two usable rewards.
        changed: pairs whose label differs from that of the data.
        skipped: rows of the data that cannot be used; a file beside the output lists them.
        metrics: the judge's counts and its spending over all starts.
    """

    output: str
    rows: int
    labelled: int
    ties: int
    unusable: int
    unpaired: int
    changed: int
    skipped: int
    metrics: Mapping[str, float]

    def numbers(self) -> dict[str, Any]:
        """Return all numbers by name."""
        values = asdict(self)
        return values | dict(values.pop("metrics"))


def label(
    data: DataConfig,
    cfg: RewardConfig,
    output: Path,
    *,
    pairs: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Counts:
    """Label rows and write them to a .jsonl or .parquet file, which appears when it is complete.

    Verdicts and rewards are stored in a file beside the output as soon as they exist, so the same call
    after an interruption never asks or pays twice. Limits hold for all calls with this output.

    Args:
        data: the rows: pairs, or prompts with a completion.
        cfg: the judge or the rewards.
        output: the file to write.
        pairs: turn completions into one pair per prompt, the best against the worst.
        seed: seed of `label_noise`.
        options: options of models: `device`, `fast`, `trust_remote_code`.
        say: shows a message to the user.
        progress: receives the number of labelled groups and of all groups.

    Raises:
        DataError: the data cannot be read, or the output cannot be written.
        AnnotatorError, ConfigError, ModelError: the annotator cannot be used.
        BudgetError: a limit is reached; everything so far is kept.
        RunError: another process writes the same output, or the rewards changed since it was begun.
    """
    check_target(output, data.data)
    items, account = read_items(data)
    for line in (*account.overview(), *_notes(account, items)):
        say(f"{data.data}: {line}")
    are_pairs = len(items[0].answers) == 2
    if pairs and are_pairs:
        raise ConfigError("pairs is set, but the data are pairs already; leave it out")
    with _opened(output, cfg.verdict_cache) as (journal, ledger):
        _write_skipped(output, account)
        prompts = {item.prompt.id for item in items}
        worker = labeller(
            cfg,
            options or {},
            seed=seed,
            ledger=ledger,
            journal=journal,
            output=output,
            one_completion=not are_pairs and len(prompts) == len(items),
            say=say,
        )
        groups = [[i] for i in range(len(items))]
        if not are_pairs and worker.compares:
            groups = _by_prompt(items)
            _require_some_pairs(groups)
        labels: list[Labels] = []
        progress(0, len(groups))
        for start in range(0, len(groups), SLICE):
            labels += worker(groups_of(items, groups[start : start + SLICE]))
            progress(len(labels), len(groups))
        if pairs and not worker.compares:
            groups, labels = _merged(_by_prompt(items), labels)
        rows = list(_rows(items, groups, labels, worker, pairs=pairs))
        write_rows(output, rows)
        unpaired = len(groups) - len(rows) if pairs else 0
        return _counts(output, rows, account, worker.metrics(), unpaired=unpaired)


def groups_of(items: Sequence[Item], groups: Sequence[Sequence[int]]) -> list[Any]:
    """Return the groups of some rows, given by the numbers of their rows."""
    made = []
    for own in groups:
        first = items[own[0]].group
        completions = tuple(c for i in own for c in items[i].group.completions)
        made.append(type(first)(first.prompt, completions))
    return made


def _require_some_pairs(groups: Sequence[Sequence[int]]) -> None:
    if all(len(own) == 1 for own in groups):
        raise ConfigError(
            "every prompt has one completion, so there is nothing to compare; give --judge-mode score, or "
            "data with several completions of a prompt"
        )


def _merged(groups: list[list[int]], labels: Sequence[Labels]) -> tuple[list[list[int]], list[Labels]]:
    """Return groups of rows with one `Labels` each, from the labels of the single rows."""
    return groups, [
        Labels(
            tuple(labels[i].rewards[0] for i in own),
            {},
            sum(labels[i].verdicts for i in own),
            sum((labels[i].amount for i in own), Amount()),
        )
        for own in groups
    ]


def _by_prompt(items: Sequence[Item]) -> list[list[int]]:
    """Return the numbers of the rows of each prompt."""
    numbers: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        numbers.setdefault(item.prompt.id, []).append(i)
    return list(numbers.values())


def _rows(
    items: Sequence[Item],
    groups: Sequence[Sequence[int]],
    labels: Sequence[Labels],
    worker: Labeller,
    *,
    pairs: bool,
) -> Iterator[dict[str, Any]]:
    for own, given in zip(groups, labels, strict=True):
        if len(items[own[0]].answers) == 2:
            yield pair_row(items[own[0]], given, worker.name)
        elif pairs:
            row = best_worst_row([items[i] for i in own], given, worker.name)
            if row is not None:
                yield row
        else:
            for i, reward in zip(own, given.rewards, strict=True):
                yield completion_row(items[i], reward, given, len(own), worker.name)


def _counts(
    output: Path,
    rows: Sequence[Mapping[str, Any]],
    account: Account,
    metrics: Mapping[str, float],
    *,
    unpaired: int,
) -> Counts:
    statuses = Counter(row["status"] for row in rows)
    return Counts(
        output=str(output),
        rows=len(rows),
        labelled=statuses["labelled"],
        ties=statuses["tie"],
        unusable=statuses["unusable"],
        unpaired=unpaired,
        changed=sum(row.get("data_prefers") == "rejected" for row in rows),
        skipped=account.bad,
        metrics=metrics,
    )


def _notes(account: Account, items: Sequence[Item]) -> Iterator[str]:
    """Yield the account's lines, without columns, which are all kept, and the columns that are renamed."""
    account.use(None)
    yield from account.lines()
    renamed = {name for item in items for name in item.prompt.columns if clashes(name)}
    if renamed:
        listed = ", ".join(f"{name} to data_{name}" for name in sorted(renamed))
        yield f"renamed columns that labelling writes itself: {listed}"


def _write_skipped(output: Path, account: Account) -> None:
    """List the rows that cannot be used in a file beside the output; remove an older list."""
    path = output.with_name(f"{output.name}.skipped.jsonl")
    if account.skipped:
        write_rows(path, [asdict(row) for row in account.skipped])
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _opened(output: Path, cache: Path | None) -> Iterator[tuple[Journal, Ledger]]:
    """Open the journal and the ledger beside the output; another process must not write them."""
    path = output.with_name(output.name + JOURNAL)
    with (
        _locked(output),
        closing(Journal(path)) as journal,
        closing(Ledger(path, cache=cache)) as ledger,
    ):
        yield journal, ledger


def _locked(output: Path) -> AbstractContextManager[object]:
    """Return the acquired lock of the output, which is released at the end of its context."""
    lock = FileLock(output.with_name(f".{output.name}.lock"), timeout=1)
    try:
        return lock.acquire()
    except (Timeout, OSError) as error:
        if isinstance(error, Timeout) and Path(lock.lock_file).exists():
            raise RunError(
                f"another process labels {str(output)!r}; wait for it, or use another --output"
            ) from None
        raise RunError(
            f"{str(output)!r} cannot be written: {str(output.parent)!r} accepts no new files; use another "
            "--output"
        ) from None
