"""The directory of a run: who holds it, what is in it, and whether it may go on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from palate.config import ModelConfig, RunConfig
from palate.errors import RunError
from palate.journal import Journal
from palate.model.device import resolve
from palate.run.checkpoints import Checkpoint
from palate.run.status import write_json
from palate.rundir import LOCK, description_in

_PACKAGES = ("palate", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")

_LEFT_EARLY = (LOCK, ".config.json.part")
"""All that a run leaves that is killed before it is described."""


class RunDirectory:
    """A run's directory, held by this process until `release`.

    A directory that holds a run of the same configuration is gone on with; any other run in it is refused,
    or with `cfg.overwrite` put aside and brought back if nothing comes of the new one.

    Attributes:
        path: where it is.
        id: of the run; it moves with the directory.
        resumed: whether a run was there that goes on.
        changes: what differs from when it began, in words, where that changes its last bits.

    Raises:
        RunError: another process holds it; it holds a run of another configuration, or something that is
            no run; it cannot be written.
    """

    def __init__(self, path: Path, method: str, cfg: RunConfig) -> None:
        self.path = path
        self.resumed = False
        self.changes: list[str] = []
        self._replaced: Path | None = None
        self._lock: FileLock | None = None
        description = describe(method, cfg)  # before anything is touched: it finds what is wrong, too
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"the output {str(path)!r} is no name in UTF-8; give --output another one"
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
        """Write `config.json`. A run that goes on does so once it has taken account of what has changed."""
        write_json(self.path / "config.json", self._description)

    def add(self, name: str, value: Any) -> None:
        """Add an entry to `config.json`; a run that resumes writes it with the others, in `settle`."""
        self._description[name] = value
        if not self.resumed:
            self.settle()

    def journal(self, latest: Checkpoint | None) -> Journal:
        """The run's journal, a new one for a new run.

        Args:
            latest: the last checkpoint of the run that is gone on with.

        Raises:
            RunError: it is not the one that belongs to the checkpoints.
        """
        path = self.path / "journal.db"
        way_out = "bring back the one that was there, or start anew with --overwrite"
        if latest is not None and not path.exists():
            raise RunError(f"journal {str(path)!r} is gone; {way_out}")
        journal = Journal(path)
        known = journal.fact("run")
        wrong = None
        if known is not None and known != self.id:
            wrong = "belongs to another run"
        elif latest is not None and (known is None or len(journal.metrics()) < latest.position.metrics):
            wrong = f"lacks what led to {latest.path.name}: it is new, or an older copy"
        if wrong is not None:
            journal.close()
            raise RunError(f"journal {str(path)!r} {wrong}; {way_out}")
        if known is None:
            journal.keep_fact("run", self.id)
        return journal

    def keep(self) -> None:
        """Something has been done: the run that was replaced may go."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def release(self) -> None:
        """Let others have the directory. If nothing was done, the run that was replaced comes back."""
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
                f"the run in {str(self.path)!r} has lost its config.json, or it is damaged; bring back a "
                "good copy, or give --output another directory"
            )
        if occupied and there is None:
            raise RunError(f"{str(self.path)!r} is there and holds no run; give --output another directory")
        if self.path.is_symlink() and cfg.overwrite:
            raise OSError("it is a symbolic link to a run; give the run's own path")
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
            raise RunError(f"{str(self.path)!r} holds a run already, {refusal}")
        else:
            self._replace(begun=False)

    def _hold(self) -> None:
        lock = FileLock(self.path / LOCK, timeout=1)  # whoever lists runs holds it for an instant
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"another process works on the run in {str(self.path)!r}; wait for it, or give --output "
                "another directory"
            ) from None
        self._lock = lock

    @property
    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.replaced")

    def _settle_replaced(self, there: dict[str, Any] | None) -> dict[str, Any] | None:
        """Of a run put aside and one in its place by a process that was killed, keep the one that counts."""
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
        """Make room: what never began is removed, a run is kept until this one has done something."""
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
        """Remove the directory. It loses its name first, so that a kill leaves no part of it there."""
        gone = self.path.with_name(f".{self.path.name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(self.path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _resume(self, there: dict[str, Any], description: dict[str, Any], cls: type[RunConfig]) -> None:
        self.resumed = True
        now, then = description["config"], there["config"]
        self.changes = [
            f"{key} was {then.get(key)!r} and is {now[key]!r}"
            for key in sorted(cls.may_change_bits & now.keys())
            if now[key] != then.get(key)
        ]
        for part in ("versions", "machine", "resolved"):
            self.changes += [
                f"{key} was {there[part].get(key)} and is {value}"
                for key, value in description[part].items()
                if there[part].get(key) != value
            ]
        dtype = there["resolved"].get("dtype")
        if dtype != description["resolved"].get("dtype"):
            raise RunError(
                f"the run in {str(self.path)!r} began in {dtype}; give --dtype {dtype} to go on with it"
            )
        description["id"], description["started"] = there["id"], there["started"]
        description["resumed"] = [*there.get("resumed", []), {"at": now_text(), "changes": self.changes}]


def describe(method: str, cfg: RunConfig) -> dict[str, Any]:
    """What `config.json` says of a run: its configuration, versions, processor."""
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
        },
        "started": now_text(),
    }


def has_begun(directory: Path) -> bool:
    """Whether a run has done anything that would be missed."""
    if any((directory / name).exists() for name in ("checkpoints", "summary.json")):
        return True
    if not (directory / "journal.db").exists():
        return False
    try:
        journal = Journal(directory / "journal.db")
    except RunError:  # what is damaged was something
        return True
    try:
        return not journal.is_empty()
    finally:
        journal.close()


def now_text() -> str:
    """Local time, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _description_in(directory: Path) -> dict[str, Any] | None:
    """Return the description of the run in a directory; None if it holds no run, or a damaged one.

    Models have a `config.json` as well, and must not be deleted.

    Raises:
        RunError: it may not be read.
    """
    try:
        found = description_in(directory)
    except RunError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return None  # it is not JSON
    kinds = {"id": str, "machine": dict, "resolved": dict}  # what resuming needs besides
    whole = found is not None and all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    return found if whole else None


def _refusal(there: Mapping[str, Any], here: Mapping[str, Any], cls: type[RunConfig]) -> str | None:
    """Why the run that is there is not the one that is asked for, and what to do."""
    way_out = "give --output another directory, or replace it with --overwrite"
    if there["method"] != here["method"]:
        return f"of {there['method']} and not {here['method']}; {way_out}"
    then, now = there["config"], here["config"]
    allowed = cls.may_change | cls.may_change_bits
    if there["resolved"].get("dtype") == here["resolved"].get("dtype"):
        allowed |= {"dtype"}  # "auto", and what it stands for
    changed = [
        f"{key} {then.get(key)!r} and not {now.get(key)!r}"
        for key in sorted(now.keys() | then.keys())
        if then.get(key) != now.get(key)
        and (key not in allowed or (key in cls.may_grow and (then.get(key) or 0) > (now.get(key) or 0)))
    ]
    if not changed:
        return None
    return f"with {', '.join(changed)}; to go on with it, give what it began with; else {way_out}"
