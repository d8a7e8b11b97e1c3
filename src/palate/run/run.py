"""A run: its directory, its randomness, its clock. It never touches data or losses."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError

from palate.config import ModelConfig, RunConfig
from palate.errors import RunError
from palate.model.load import resolve
from palate.run.display import Display
from palate.run.trackers import Trackers, check_trackers
from palate.types import Group

Number = float | int
Metrics = Mapping[str, Number]

_PACKAGES = ("palate", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")


class Saves(Protocol):
    """Anything that writes itself into a directory, as a learner does."""

    def save(self, directory: Path) -> None:
        """Write everything needed to load it again."""


class Run:
    """The directory of one run and what is written there as it goes.

    `config.json` comes first, with versions, processor and seed; `metrics.jsonl` gets a row per step;
    `checkpoints/step-N/` appear whole or not at all; `summary.json` ends it. Used as a context manager.

    Attributes:
        measured: what `log_measurement` was given, in order.

    Args:
        cfg: the run's configuration; all of it is written, `output`, `seed` and the like are used.
        method: name of the method, for the directory's default name and for the reader.
        display: where progress is shown; nowhere by default.

    Raises:
        RunError: the directory holds a run already, or something else, or cannot be written.
        ConfigError: a tracker of `report_to` is unknown or not installed.
    """

    def __init__(self, cfg: RunConfig, *, method: str, display: Display | None = None) -> None:
        self.cfg = cfg
        self.method = method
        self.directory = cfg.output or Path("runs") / method
        self.display = display or Display(quiet=True)
        check_trackers(cfg.report_to)  # before a run is replaced
        self._replaced: Path | None = None
        """The run that was in the directory: kept until this one has done something."""
        description = self._description()  # what it finds wrong, too
        self._open_directory()
        with ExitStack() as undo:
            undo.callback(self._put_back)
            _write_json(self.directory / "config.json", description)
            self._metrics = (self.directory / "metrics.jsonl").open("a", encoding="utf-8")
            where = self.directory / "trackers"
            self._trackers = Trackers(cfg.report_to, where, cfg.model_dump(mode="json"))
            undo.pop_all()
        self._started = self._step_began = self._last_event = time.perf_counter()
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._amounts: defaultdict[str, int] = defaultdict(int)
        self._total_tokens = 0
        self.measured: list[Metrics] = []

    def __enter__(self) -> Self:
        """Start showing progress."""
        self.display.start(self.method, self.directory)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close what is open; what was written stays."""
        self.display.stop()
        self._metrics.close()
        self._trackers.close()
        self._put_back()

    # -- randomness --------------------------------------------------------------------------------

    def seed(self, *names: str | int) -> int:
        """A seed for one purpose, such as `run.seed("sample", step)`; purposes do not share streams."""
        text = ":".join(map(str, (self.cfg.seed, *names)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")

    # -- clock -------------------------------------------------------------------------------------

    def observe(self, stage: str, amount: int = 0) -> None:
        """Told by the parts when they have done some work: the time since the last call was theirs.

        Args:
            stage: `sample`, `annotate`, `learn` or `evaluate`.
            amount: tokens (sample, learn) or completions (annotate) done.
        """
        now = time.perf_counter()
        self._seconds[stage] += now - self._last_event
        self._amounts[stage] += amount
        self._last_event = now
        self.display.working(stage, self._rate(stage))

    def steps(self, count: int) -> Iterator[int]:
        """The numbers of the steps to do, with the clock started for each."""
        self.display.expect(count)
        for step in range(count):
            self._seconds.clear()
            self._amounts.clear()
            self._step_began = self._last_event = time.perf_counter()
            self.display.step(step)
            yield step

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the run began."""
        return time.perf_counter() - self._started

    # -- records -----------------------------------------------------------------------------------

    def log(self, step: int, *metrics: Metrics, samples: Sequence[Group] = ()) -> None:
        """Write a step's metrics. `num_tokens` is summed up over the run, as TRL does.

        Args:
            step: counted from 0; written counted from 1.
            metrics: numbers by name; one mapping per part of the method.
            samples: completions of this step, one of which is shown.
        """
        row: dict[str, Number] = {"step": step + 1}
        for part in metrics:
            row |= part
        if "num_tokens" in row:
            self._total_tokens += int(row["num_tokens"])
            row["num_tokens"] = self._total_tokens
        row |= {f"time/{stage}": round(seconds, 4) for stage, seconds in self._seconds.items()}
        row["step_time"] = round(time.perf_counter() - self._step_began, 4)
        if "sample" in self._amounts:
            row["sampling/tokens_per_second"] = round(self._rate("sample"), 1)
        self._write(row)
        self.display.metrics(row, samples)

    def log_measurement(self, step: int, metrics: Metrics) -> None:
        """Write numbers that belong to no step's work, such as a held-out measurement, and keep them."""
        self._write({"step": step, **metrics})
        self.measured.append(metrics)

    def save(self, learner: Saves, step: int) -> Path:
        """Write `checkpoints/step-N` in Hugging Face layout; it appears whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        self._let_go()
        target = self.directory / "checkpoints" / f"step-{step}"
        scratch = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            scratch.mkdir(parents=True)
            learner.save(scratch)
            if target.exists():
                shutil.rmtree(target)
            os.replace(scratch, target)
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RunError(f"checkpoint {target} cannot be written: {reason}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # gone already if all went well
        return target

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        self._let_go()
        _write_json(self.directory / "summary.json", summary)

    # -- inside ------------------------------------------------------------------------------------

    def _write(self, row: Mapping[str, Number]) -> None:
        self._metrics.write(json.dumps(_finite(row)) + "\n")
        self._metrics.flush()
        self._let_go()
        self._trackers.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))

    def _rate(self, stage: str) -> float:
        return self._amounts[stage] / max(self._seconds[stage], 1e-9)

    def _open_directory(self) -> None:
        directory = self.directory
        try:
            if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                if not _is_run(directory):
                    raise RunError(
                        f"{str(directory)!r} is there and holds no run; give --output another directory"
                    )
                metrics = directory / "metrics.jsonl"
                begun = metrics.is_file() and metrics.stat().st_size > 0
                begun = begun or any((directory / name).exists() for name in ("checkpoints", "summary.json"))
                if begun and not self.cfg.overwrite:
                    raise RunError(
                        f"{str(directory)!r} holds a run already; give --output another directory, or "
                        "replace it with --overwrite"
                    )
                self._put_aside(begun)
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"run directory {str(directory)!r} cannot be written: {error.strerror or error}"
            ) from error

    def _put_aside(self, begun: bool) -> None:
        """Make room: what never began is removed, a run is kept until this one has done something."""
        if self.directory.is_symlink():
            raise OSError("it is a symbolic link to a run; give the run's own path")
        if not begun:
            shutil.rmtree(self.directory)
            return
        self._replaced = self.directory.with_name(f".{self.directory.name}.replaced")
        shutil.rmtree(self._replaced, ignore_errors=True)
        os.replace(self.directory, self._replaced)

    def _let_go(self) -> None:
        """Something has been done: the run that was replaced may go."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def _put_back(self) -> None:
        """Nothing was done: bring back the run that was here."""
        if self._replaced is not None and self._replaced.is_dir():
            shutil.rmtree(self.directory, ignore_errors=True)
            os.replace(self._replaced, self.directory)

    def _description(self) -> dict[str, Any]:
        resolved = {}
        if isinstance(self.cfg, ModelConfig):
            device, dtype = resolve(self.cfg)
            resolved = {"device": str(device), "dtype": str(dtype).removeprefix("torch.")}
        return {
            "method": self.method,
            "config": self.cfg.model_dump(mode="json"),
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
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }


def _is_run(directory: Path) -> bool:
    """Whether a run of ours is there: models have a `config.json` as well, and must not be deleted."""
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    return isinstance(found, dict) and {"method", "config", "versions"} <= found.keys()


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """With null for infinity and not-a-number, for which JSON has no words."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, path)
