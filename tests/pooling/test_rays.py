"""Pools on Ray: the pipeline on a stand-in for Ray, then on Ray itself where it is installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

import palate.pooling.rays as rays
from palate.config import ModelConfig
from palate.errors import AnnotatorError, ConfigError, DataError, RunError
from palate.model import load_model
from palate.pooling import make_pool
from palate.pooling.rays import TRIES
from palate.pooling.shards import scores_anywhere


class Rows:
    """A data set of the stand-in: each row goes through the stages by itself, the last row first."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows, self._stages = rows, []  # type: ignore[var-annotated]

    def map_batches(self, kind: Any, *, fn_constructor_args: Any, batch_size: int, **_: Any) -> Rows:
        assert batch_size == 1
        self._stages.append(kind(*fn_constructor_args))
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for row in reversed(self._rows):
            batch: dict[str, Any] = {name: [value] for name, value in row.items()}
            for stage in self._stages:
                batch = stage(batch)
            yield {name: values[0] for name, values in batch.items()}


class StandIn:
    """Ray's functions that a pool calls. Notes the options of `init`."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.ended = 0
        self.exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))
        context = SimpleNamespace()
        self.data = SimpleNamespace(
            DataContext=SimpleNamespace(get_current=lambda: context),
            ActorPoolStrategy=lambda **options: options,
            from_items=lambda rows, override_num_blocks: Rows(rows),
        )

    def init(self, **options: Any) -> None:
        self.started.append(options)

    def shutdown(self) -> None:
        self.ended += 1

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 4.0}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(rays, "_ray", lambda cfg: stand_in)
    return stand_in


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(directory / "shards").to_pylist())


def test_workers_give_what_one_process_gives(configure: Any, ray: StandIn, tmp_path: Path) -> None:
    made = make_pool(configure(ray=True, output=tmp_path / "many"))
    alone = make_pool(configure())
    assert rows_of(made.directory) == rows_of(alone.directory)
    assert {k: v for k, v in made.summary.items() if k != "seconds"} == {
        k: v for k, v in alone.summary.items() if k != "seconds"
    }
    assert ray.ended == 1
    assert list((made.directory / "sampled").iterdir()) == []


def test_the_ports_are_closed_to_other_machines(
    configure: Any, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pool(configure(ray=True))
    assert ray.started[0]["address"] == "local"
    assert ray.started[0]["include_dashboard"] is False
    assert ray.started[0]["object_store_memory"] <= 1 << 28


def test_a_cluster_is_joined_and_not_started(configure: Any, ray: StandIn) -> None:
    make_pool(configure(ray=True, ray_address="auto"))
    assert ray.started[0]["address"] == "auto"
    assert "num_cpus" not in ray.started[0]


@pytest.mark.parametrize("body", ["    return [float(len(c)) for c in completions]\n"])
def test_functions_are_asked_once_by_the_process_that_stores_the_answers(
    configure: Any, functions: Any, ray: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    cfg = configure(reward=functions(body), ray=True)
    with monkeypatch.context() as patch:
        calls: list[int] = []

        def dies(*args: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            shown(*args)

        shown = rays.shown
        patch.setattr(rays, "shown", dies)
        with pytest.raises(KeyboardInterrupt):
            make_pool(cfg)
    make_pool(cfg)
    assert (tmp_path / "asked").read_text() == "x" * 24
    keys = Counter((row["prompt_row"], row["sample"]) for row in rows_of(cfg.output))
    assert keys == Counter((row, sample) for row in range(8) for sample in range(3))


@pytest.mark.parametrize(
    ("reward", "there"),
    [
        (["length:3"], True),
        (["model:x", "0.5*length:3"], True),
        (["ranker:x"], True),
        (["rewards.py:f"], False),
        (["model:x", "0.5*module:f"], False),
        ([], False),
    ],
)
def test_only_rewards_without_a_price_are_computed_by_workers(
    configure: Any, reward: list[str], there: bool
) -> None:
    assert scores_anywhere(configure(reward=reward)) is there


def test_an_error_of_a_worker_is_one_sentence_here(configure: Any, ray: StandIn) -> None:
    with pytest.raises(DataError, match="leaves no room") as caught:
        make_pool(configure([{"prompt": "x" * 300, "place": i} for i in range(4)], ray=True))
    assert "Traceback" not in str(caught.value)
    assert ray.ended == 1


def test_a_shard_that_kills_its_workers_is_named(
    configure: Any, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ray starts a worker again for ever. The files of a start that was killed do not count.
    cfg = configure(ray=True)

    def deaths(source: Any, prompts: Any, rows: range) -> Any:
        if rows.start == 4:
            raise SystemExit
        return sample(source, prompts, rows)

    sample = rays.sample_shard
    monkeypatch.setattr(rays, "sample_shard", deaths)

    def again(self: Rows) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            batch = {name: [value] for name, value in row.items()}
            for stage in self._stages:
                for _ in range(TRIES + 2):
                    try:
                        batch = stage(batch)
                    except SystemExit:
                        continue
                    break
            yield {name: values[0] for name, values in batch.items()}

    monkeypatch.setattr(Rows, "iter_rows", again)
    for _ in range(2):
        with pytest.raises(
            RunError, match=rf"{TRIES} workers died while sampling shard 2 \(prompts 4 to 5\)"
        ):
            make_pool(cfg)
    monkeypatch.setattr(rays, "sample_shard", sample)
    assert make_pool(cfg).summary["completions"] == 24


def test_a_failure_of_ray_keeps_what_is_finished(
    configure: Any, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    iterate = Rows.iter_rows

    def fails(self: Rows) -> Iterator[dict[str, Any]]:
        for i, row in enumerate(iterate(self)):
            if i == 2:
                raise ray.exceptions.RayError("the node died.\nmore")
            yield row

    cfg = configure(ray=True)
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "iter_rows", fails)
        with pytest.raises(
            RunError, match=r"Ray failed \(the node died\); finished shards are kept, run the same"
        ):
            make_pool(cfg)
    assert len(list((cfg.output / "shards").iterdir())) == 3  # the third was finished before Ray failed
    assert make_pool(cfg).summary["completions"] == 24


def test_a_worker_that_reads_other_data_refuses(configure: Any, ray: StandIn, monkeypatch: Any) -> None:
    cfg = configure(ray=True)
    monkeypatch.setattr(rays, "content_key", lambda prompts: str(time.perf_counter_ns()))
    with pytest.raises(RunError, match="a worker reads other prompts"):
        make_pool(cfg)


def test_rewards_that_fail_everywhere_end_the_pool(configure: Any, functions: Any, ray: StandIn) -> None:
    cfg = configure(reward=functions("    raise OSError('no network')\n"), ray=True, shard_size=4)
    with pytest.raises(AnnotatorError, match="no network"):
        make_pool(cfg)


def test_without_ray_the_command_to_install_it_is_named(
    configure: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"Ray is not installed .*pip install palate\[ray\]"):
        make_pool(configure(ray=True))


def test_python_objects_cannot_travel(configure: Any, ray: StandIn) -> None:
    with pytest.raises(ConfigError, match="2 rows given in Python is an object of this process; give a file"):
        make_pool(configure(ray=True, data=[{"prompt": "a"}, {"prompt": "b"}]))


def test_a_worker_with_other_weights_refuses(
    configure: Any, ray: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rays, "start_hash", lambda model: "0" * 64)
    with pytest.raises(RunError, match=r"a worker loads .* with other weights, or in another number format"):
        make_pool(configure(ray=True))


def test_a_worker_with_another_reward_model_refuses(
    configure: Any, ray: StandIn, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ModelConfig(model=model, dtype="float32", device="cpu", lora=False)
    load_model(cfg, head="scalar").save(tmp_path / "scorer")
    reward = f"model:{tmp_path / 'scorer'}"
    other = {"code": {reward: "0"}}
    monkeypatch.setattr(rays, "annotator_facts", lambda cfg: other)
    with pytest.raises(RunError, match=rf"a worker reads other files of {reward} than the process"):
        make_pool(configure(ray=True, reward=[reward]))


# ---- Ray itself -------------------------------------------------------------------------------------


def descendants(root: int) -> dict[int, str]:
    """Command lines of the processes below one."""
    parents: dict[int, int] = {}
    words: dict[int, str] = {}
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            try:
                words[int(place.name)] = (place / "cmdline").read_bytes().decode(errors="replace")
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {root}
    while more := {n for n, parent in parents.items() if parent in found} - found:
        found |= more
    return {n: words[n] for n in found - {root} if n in words}


@pytest.fixture
def started(configure: Any) -> Iterator[Callable[[], tuple[subprocess.Popen[bytes], Path]]]:
    """Starts a pool on Ray in a process of its own."""
    cfg = configure([{"prompt": f"q{i}", "place": i} for i in range(60)], ray=True, n=4, max_new_tokens=60)
    code = (
        "import sys\nfrom palate.pooling import PoolConfig, make_pool\n"
        "make_pool(PoolConfig.model_validate_json(sys.argv[1]))\n"
    )
    running: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[subprocess.Popen[bytes], Path]:
        running.append(subprocess.Popen([sys.executable, "-c", code, cfg.model_dump_json()], env=os.environ))
        return running[-1], cfg.output

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install palate[ray]")
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_a_worker_and_then_the_driver_are_killed(started: Any) -> None:
    process, directory = started()

    def finished() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (directory / "shards").glob("*.parquet")}

    while len(finished()) < 6 and process.poll() is None:
        time.sleep(0.2)
    worker = next(number for number, words in descendants(process.pid).items() if "SamplingWorker" in words)
    os.kill(worker, signal.SIGKILL)
    while len(finished()) < 12 and process.poll() is None:
        time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = finished()
    again, _ = started()
    assert again.wait() == 0
    assert before.items() <= finished().items()
    keys = Counter((row["prompt_row"], row["sample"]) for row in rows_of(directory))
    assert keys == Counter((row, sample) for row in range(60) for sample in range(4))
    assert json.loads((directory / "summary.json").read_text())["completions"] == 240
