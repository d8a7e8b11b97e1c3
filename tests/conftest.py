"""Set up before torch is used: one thread a worker, nothing fetched, no library chatter."""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "6000")  # as `palate.spinning`, for pytest may load torch before it
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch import Tensor

from palate.learn import Policy
from palate.quiet import quiet_libraries
from palate.rundir import RunRecord, Sample, Status
from palate.testing import tiny_model, tiny_policy

MakeRun = Callable[..., Path]
SameGradients = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], None]

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

torch.set_num_threads(1)
quiet_libraries()
# Python would search the million objects of the libraries for garbage again and again: a seventh of the time.
gc.collect()
gc.freeze()
gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session", autouse=True)
def _bfloat16_everywhere() -> Iterator[None]:
    """Let tests compute in bfloat16 on a CPU without units for it, where it is slow but right."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("palate.model.device.has_bfloat16", lambda device: True)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random two-layer Llama over bytes, with a chat template."""
    return tiny_model(tmp_path_factory.mktemp("tiny"), chat=True)


@pytest.fixture(scope="session")
def tiny_plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same without a chat template."""
    return tiny_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture
def make_policy(tiny: str) -> Callable[..., Policy]:
    """Policies over the tiny model; options as for `tiny_policy`."""

    def make(**options: object) -> Policy:
        return tiny_policy(Path(tiny), **options)  # type: ignore[arg-type]

    return make


# ---- Gradients -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def same_gradients() -> SameGradients:
    """Checks that two sets of gradients by name, computed in float32, differ by rounding alone.

    An element is a sum of terms as large as any in the network, which may cancel out, and each processor adds
    them in another order. So the largest gradient of all decides how far an element may be off.
    """

    def check(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        assert ours.keys() == theirs.keys()
        largest = max(float(gradient.abs().max()) for gradient in theirs.values())
        assert largest > 0
        close = {"atol": 128 * torch.finfo(torch.float32).eps * largest, "rtol": 1e-4}
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, msg=lambda text: f"{name}: {text}", **close)  # noqa: B023

    return check


# ---- Run directories made by hand ------------------------------------------------------------------

FINISHED = Status("finished", 4, 4, "", 61.0, "2026-11-21T14:07:02+0000")


def by_step(metrics: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """A row a step, counted from 1, of metrics that are given as one list each."""
    count = max((len(values) for values in metrics.values()), default=0)
    named = ({name: values[i] for name, values in metrics.items() if i < len(values)} for i in range(count))
    return [{"step": i + 1, **row} for i, row in enumerate(named)]


@pytest.fixture
def record() -> Callable[..., RunRecord]:
    """A record made by hand: `metrics` are lists with one value a step, `measured` with one a measurement."""

    def make(
        metrics: Mapping[str, Sequence[float]] | None = None,
        measured: Mapping[str, Sequence[float]] | None = None,
        *,
        summary: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        resolved: Mapping[str, Any] | None = None,
        samples: Sequence[Sample] = (),
        status: Status = FINISHED,
        method: str = "oaif",
        directory: Path = Path("runs/a"),
    ) -> RunRecord:
        measurements = [{**row, "step": row["step"] - 1} for row in by_step(measured or {})]
        return RunRecord(
            directory=directory,
            method=method,
            description={"method": method, "config": config or {}, "resolved": resolved or {}},
            status=status,
            rows=tuple(by_step(metrics or {})),
            measurements=tuple(measurements),
            summary=summary or {},
            samples=tuple(samples),
        )

    return make


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """A run's directory as a run leaves it; NaN becomes null."""

    def write(
        name: str = "a",
        *,
        rows: Sequence[Mapping[str, Any]] = (),
        samples: Sequence[Mapping[str, Any]] = (),
        summary: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        status: Status = FINISHED,
        method: str = "oaif",
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        description = {
            "method": method,
            "config": {"model": "smollm2", "data": "everyday", **(config or {})},
            "resolved": {"device": "cpu", "dtype": "float32"},
            "versions": {"palate": "0.1.0"},
            "python": "3.12.1",
            "machine": {"system": "Linux", "threads": 2},
            "started": "2026-11-21T14:02:11+0000",
        }
        (directory / "config.json").write_text(json.dumps(description))
        (directory / "status.json").write_text(json.dumps(asdict(status)))
        lines = [json.dumps({k: None if v != v else v for k, v in row.items()}) + "\n" for row in rows]
        (directory / "metrics.jsonl").write_text("".join(lines))
        if summary is None and samples:
            summary = {}  # it is written after them
        if summary is not None:
            (directory / "summary.json").write_text(json.dumps({"method": method, "steps": 4, **summary}))
        if samples:
            (directory / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        return directory

    return write


@pytest.fixture(name="describe")
def describe_fixture() -> MakeRun:
    """Writes the `config.json` of a run."""
    return describe


def describe(directory: Path, *, method: str = "oaif", started: str | None = None, **config: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    found = {"method": method, "config": config, "versions": {}} | ({"started": started} if started else {})
    (directory / "config.json").write_text(json.dumps(found))
    return directory


STARTED = """
import os, runpy, sys

os.environ.clear()
os.environ.update(environ)
for number, file in enumerate(files, start=1):
    os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
sys.argv, sys.path[0] = line, os.path.dirname(line[0])
runpy.run_path(line[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `subprocess.run` for a Python script, from a process that has loaded the libraries already.

    A start takes a moment instead of the seconds that torch and transformers need.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["palate.launch", "palate.report.render"])
    files = [str(tmp_path_factory.mktemp("forked") / name) for name in ("stdout", "stderr")]

    def run(line: Sequence[str], *, env: Mapping[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        given = {"line": list(line[1:]), "environ": dict(env), "files": files}
        process = context.Process(target=exec, args=(STARTED, given))
        process.start()
        process.join()
        assert process.exitcode is not None
        texts = [Path(file).read_text("utf-8") for file in files]
        return subprocess.CompletedProcess(line, process.exitcode, *texts)

    return run


@pytest.fixture(scope="module")
def soak(forked: Callable[..., subprocess.CompletedProcess[str]]) -> Iterator[ModuleType]:
    """The script that kills runs, for its `Trial`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        spec = importlib.util.spec_from_file_location("soak", EXPERIMENTS / "soak.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setattr(module, "subprocess", SimpleNamespace(run=forked))
        yield module
