"""The directory of a run: its lock, its description, and the decision to start, resume or refuse."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from palate.config import ModelConfig, RunConfig
from palate.errors import RunError
from palate.journal import Journal
from palate.model.device import resolve
from palate.run.checkpoint import Checkpoint
from palate.run.status import write_json
from palate.rundir import LOCK, description_in
from palate.rundir.files import POOL
from palate.world.start import processes_around

_PACKAGES = ("palate", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")

_BEFORE = {"processes": 1}
"""Values of runs that were written before these entries existed."""

_LEFT_EARLY = (LOCK, ".config.json.part")
"""The files of a run that is killed before it writes its description."""

LARGE = 10**9
"""Bytes of a journal whose check takes so long that the run says so."""


class RunDirectory:
    """A run's directory, locked by this process until `release`.

    A run of the same configuration in the directory is resumed. Any other run is an error; with
    `cfg.overwrite` it is moved aside, and restored if the new run ends before it did anything.

    Attributes:
        path: path of the directory.
        id: id of the run, independent of its path.
        resumed: True if the directory held a run that is resumed.
        changes: descriptions of changed settings that make results not bit-identical.

    Raises:
        RunError: another process works on the run; the directory holds a run of another configuration or
            other files; or it cannot be written.
    """

    def __init__(self, path: Path, method: str, cfg: RunConfig) -> None:
        self.path = path
        self.resumed = False
        self.changes: list[str] = []
        self._created: list[Path] = []
        self._replaced: Path | None = None
        self._lock: FileLock | None = None
        description = describe(method, cfg)  # first, since it may raise errors
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"the output {str(path)!r} cannot be written in UTF-8; use another name for --output"
            ) from None
        try:
            self._enter(description, cfg)
            self._description = description
            if not self.resumed:
                self.settle()
        except OSError as error:
            self.release()
            raise RunError(
                f"run directory {str(path)!r} cannot be written: {error.strerror or error}"
            ) from error
        except RunError:
            self.release()
            raise
        self.id: str = description["id"]

    def settle(self) -> None:
        """Write `config.json`; a resumed run does this after it has handled the changed settings."""
        write_json(self.path / "config.json", self._description)

    def add(self, name: str, value: Any) -> None:
        """Add an entry to `config.json`; a run that resumes writes it with the others, in `settle`."""
        self._description[name] = value
        if not self.resumed:
            self.settle()

    def journal(self, latest: Checkpoint | None, say: Callable[[str], None]) -> Journal:
        """Return the run's journal, a new one for a new run.

        Args:
            latest: the last checkpoint of a resumed run.
            say: shows a message, before the check of a large journal.

        Raises:
            RunError: the journal is missing or does not belong to the checkpoints.
        """
        path = self.path / "journal.db"
        way_out = "restore the original, or start over with --overwrite"
        if latest is not None and not path.exists():
            raise RunError(f"journal {str(path)!r} is missing; {way_out}")
        size = path.stat().st_size if path.exists() else 0
        if size > LARGE:
            say(f"checking the journal ({size / 1e9:.1f} GB)")
        journal = Journal(path)
        known = journal.fact("run")
        problem = None
        if known is not None and known != self.id:
            problem = "belongs to another run"
        elif latest is not None and (known is None or journal.count_metrics() < latest.position.metrics):
            problem = f"lacks the records up to {latest.path.name}: it is new or an older copy"
        if problem is not None:
            journal.close()
            raise RunError(f"journal {str(path)!r} {problem}; {way_out}")
        if known is None:
            journal.keep_fact("run", self.id)
        return journal

    def keep(self) -> None:
        """Delete the replaced run, since the new run has done something."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def release(self, *, refused: bool = False) -> None:
        """Unlock the directory. If the new run did nothing, restore the replaced run.

        Args:
            refused: the run cannot start; if it did nothing, the directories that it created are removed.
        """
        if refused and self._created and self._lock is not None and not has_begun(self.path):
            self._clear()
            for parent in self._created[1:]:
                with suppress(OSError):  # something else is in it
                    parent.rmdir()
        if self._replaced is not None and has_begun(self.path):
            self.keep()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self._replaced is not None and self._replaced.is_dir():
            self._clear()
            os.replace(self._replaced, self.path)
            self._replaced = None

    # -- inside ------------------------------------------------------------------------------------

    def _enter(self, description: dict[str, Any], cfg: RunConfig) -> None:
        occupied = self.path.exists() and (
            not self.path.is_dir() or any(p.name not in _LEFT_EARLY for p in self.path.iterdir())
        )
        there = _description_in(self.path) if occupied else None
        if occupied and there is None and has_begun(self.path):
            raise RunError(
                f"the config.json of the run in {str(self.path)!r} is missing or damaged; restore a good "
                "copy, or use another --output"
            )
        if occupied and there is None:
            raise RunError(f"{str(self.path)!r} exists but holds no run; use another --output")
        if self.path.is_symlink() and cfg.overwrite:
            raise OSError("it is a symbolic link to a run; use the path of the run itself")
        self._created = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._hold()
        there = self._settle_replaced(there)
        if there is None:
            return
        if cfg.overwrite:
            self._replace(begun=has_begun(self.path))
            return
        refusal = _refusal(there, description, type(cfg))
        if refusal is None:
            self._resume(there, description, type(cfg))
        elif has_begun(self.path):
            raise RunError(f"{str(self.path)!r} already holds a run: {refusal}")
        else:
            self._replace(begun=False)

    def _hold(self) -> None:
        lock = FileLock(self.path / LOCK, timeout=1)  # a process that lists runs locks it for an instant
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process works on the run in {str(self.path)!r}; wait for it, or use another "
                "--output"
            ) from None
        self._lock = lock

    @property
    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.replaced")

    def _settle_replaced(self, there: dict[str, Any] | None) -> dict[str, Any] | None:
        """Finish or undo a replacement that a kill interrupted; return the kept run's description."""
        if not self._aside.is_dir():
            return there
        if there is not None and has_begun(self.path):
            shutil.rmtree(self._aside)
            return there
        assert self._lock is not None
        self._clear()
        os.replace(self._aside, self.path)
        self._lock.release()
        self._hold()
        return _description_in(self.path)

    def _replace(self, *, begun: bool) -> None:
        """Empty the directory: move a run aside until this run has done something; delete other files."""
        assert self._lock is not None
        if begun:
            self._replaced = self._aside
            os.replace(self.path, self._replaced)
        else:
            self._clear()
        self._lock.release()
        self.path.mkdir(parents=True)
        self._hold()

    def _clear(self) -> None:
        """Remove the directory. It is renamed first, so that a kill leaves no partial directory."""
        gone = self.path.with_name(f".{self.path.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _resume(self, there: dict[str, Any], description: dict[str, Any], cls: type[RunConfig]) -> None:
        self.resumed = True
        now, then = description["config"], there["config"]
        self.changes = [
            f"{key} was {_value(then, key, cls)!r} and is {now[key]!r}"
            for key in sorted(cls.may_change_bits & now.keys())
            if now[key] != _value(then, key, cls)
        ]
        for part in ("versions", "machine", "resolved"):
            self.changes += [
                f"{key} was {there[part].get(key)} and is {value}"
                for key, value in description[part].items()
                if there[part].get(key, _BEFORE.get(key)) != value
            ]
        dtype = there["resolved"].get("dtype")
        if dtype != description["resolved"].get("dtype"):
            raise RunError(
                f"the run in {str(self.path)!r} started in {dtype}; use --dtype {dtype} to resume it"
            )
        description["id"], description["started"] = there["id"], there["started"]
        description["resumed"] = [*there.get("resumed", []), {"at": now_text(), "changes": self.changes}]


def _value(then: Mapping[str, Any], key: str, cls: type[RunConfig]) -> Any:
    """Return a field of an earlier start; its default if that version of Palate did not have the field."""
    return then.get(key, cls.model_fields[key].default)


def describe(method: str, cfg: RunConfig) -> dict[str, Any]:
    """Return the content of `config.json`: the run's configuration, versions and processor."""
    resolved = {}
    if isinstance(cfg, ModelConfig):
        device, dtype = resolve(cfg)
        resolved = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    return {
        "id": uuid.uuid4().hex,
        "method": method,
        "config": cfg.model_dump(mode="json"),
        "resolved": resolved,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "processes": processes_around(),
        },
        "started": now_text(),
    }


def has_begun(directory: Path) -> bool:
    """Return whether a run has results worth keeping."""
    if any((directory / name).exists() for name in ("checkpoints", "summary.json", POOL)):
        return True
    if not (directory / "journal.db").exists():
        return False
    try:
        # Only a run that resumes checks its journal: that takes seconds per GB.
        with closing(Journal(directory / "journal.db", check=False)) as journal:
            return not journal.is_empty()
    except RunError:  # a damaged journal had content
        return True


def now_text() -> str:
    """Return the local time in ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _description_in(directory: Path) -> dict[str, Any] | None:
    """Return the description of the run in a directory; None if it holds no run, or a damaged one.

    A model's directory has a `config.json` too, and must not be deleted.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        content = description_in(directory)
    except RunError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None  # the file is not JSON
    kinds = {"id": str, "machine": dict, "resolved": dict}  # further entries that a resumed run needs
    complete = content is not None and all(isinstance(content.get(k), kind) for k, kind in kinds.items())
    return content if complete else None


def _refusal(there: Mapping[str, Any], here: Mapping[str, Any], cls: type[RunConfig]) -> str | None:
    """Return why the existing run cannot be resumed, and the remedy; None if it can be resumed."""
    way_out = "use another --output, or replace the run with --overwrite"
    if there["method"] != here["method"]:
        return f"method is {there['method']} there and {here['method']} here; {way_out}"
    then, now = there["config"], here["config"]
    allowed = cls.may_change | cls.may_change_bits
    if there["resolved"].get("dtype") == here["resolved"].get("dtype"):
        allowed |= {"dtype"}  # "auto" and the dtype that it resolves to are equal
    changed = [
        f"{key} is {then.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(now.keys() | then.keys())
        if then.get(key) != now.get(key)
        and (key not in allowed or (key in cls.may_grow and (then.get(key) or 0) > (now.get(key) or 0)))
    ]
    if not changed:
        return None
    values = "the original value" if len(changed) == 1 else "the original values"
    return f"{', '.join(changed)}; use {values} to resume, or {way_out}"
