"""Pools on Ray: actors sample and score shards, and hand on their numbers only.

The samples travel in files, not through Ray's object store, so the store stays small however large the pool
is. A shard has one file name and is written completely or not at all. So a shard that Ray runs again, after a
worker died, exists once; Ray Data's own checkpoints write a block first and note it later, so that a kill
between the two repeats its rows.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from palate.annotate import annotator
from palate.errors import AnnotatorError, ConfigError, DataError, ModelError, PalateError, RunError
from palate.given import GivenModel, GivenReward, GivenRows
from palate.learn.state import start_hash
from palate.loops import content_key
from palate.model.rollouts import unobserved
from palate.pool import Facts, annotator_facts, read_shard, write_shard
from palate.pool.facts import SAMPLED, changed_rewards, missing_shards, scope_of
from palate.pooling.config import PoolConfig
from palate.pooling.engine import Served, open_server, source_of
from palate.pooling.shards import Scoring, Source, sample_shard, scores_anywhere
from palate.pooling.work import Work, loaded, read_all, shown, work_of
from palate.run import Run
from palate.run.judging import model_options

TRIES = 4
"""Workers that may die over a shard before it counts as the cause. Ray itself would try for ever."""

STORE = 256 << 20
"""Bytes of Ray's object store, which holds the prompts and the numbers of shards."""

GIVEN = (GivenModel, GivenReward, GivenRows)

_ERRORS = {kind.__name__: kind for kind in (AnnotatorError, ConfigError, DataError, ModelError, RunError)}


def on_ray(work: Work, scoring: Scoring, run: Run, facts: Facts, served: Served | None = None) -> None:
    """Make the missing shards with Ray.

    Args:
        work, scoring, run, facts: of the pool.
        served: the server that samples; None if the workers sample themselves.

    Raises:
        ConfigError: Ray is not installed, or its cluster cannot be reached.
        RunError: Ray gave up; finished shards are kept.
        PalateError: the error of a worker.
    """
    missing = missing_shards(work.directory, facts)
    if not missing:
        return
    _require_names(work.cfg)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the model of this process is gone, and the workers need its place
    ray, scores = _ray(work.cfg), scores_anywhere(work.cfg)
    for tries in (work.directory / SAMPLED).glob("*.tries"):  # of a start that was killed
        tries.unlink()
    with _started(ray, work):
        rows = _pipeline(ray, work, facts, missing, scores=scores, served=served)
        began = time.perf_counter()
        try:
            for _, row in zip(run.steps(len(missing)), rows, strict=True):
                if row["error"]:
                    raise _ERRORS.get(row["kind"], RunError)(row["error"])
                shard = int(row["shard"])
                run.observe("sample", int(row["tokens"]))
                if not scores:
                    entries = scoring(read_shard(work.sampled(shard)), work.prompts)
                    work.finish(shard, entries)
                entries = read_shard(work.path(shard))
                shown(work, shard, entries, run, time.perf_counter() - began)
                began = time.perf_counter()
        except ray.exceptions.RayError as error:
            raise RunError(
                f"Ray failed ({_first_line(error)}); finished shards are kept, run the same command again "
                "to resume, perhaps with fewer --workers"
            ) from error


@dataclass(frozen=True)
class Begun:
    """A pool as its driver began it: small, because each worker reads the prompts itself.

    Attributes:
        cfg, directory, date: as in `Work`.
        home: the working directory, to which relative paths of data and models belong.
        key: key of the prompts.
        weights: hash of the weights that sample.
        dtype: their number format.
        annotator: the facts of the rewards.
        served: the server that samples; None if the workers sample themselves.
    """

    cfg: PoolConfig
    directory: Path
    date: str
    home: Path
    key: str
    weights: str
    dtype: str
    annotator: Mapping[str, Any] | None
    served: Served | None

    def work(self) -> Work:
        """Read the prompts and return the work.

        Raises:
            RunError: the data are not those that the driver has read.
        """
        with suppress(OSError):  # another machine may lack it; then all paths must be absolute
            os.chdir(self.home)
        prompts, _ = read_all(self.cfg)
        if content_key(prompts) != self.key:
            raise RunError(
                f"a worker reads other prompts in {self.cfg.data} than the process that began the pool; "
                "give all machines the same files"
            )
        return work_of(self.cfg, self.directory, prompts, self.date)

    def require_rewards(self) -> None:
        """Check that this machine has the reward models of the driver; call `work` before.

        Raises:
            RunError: it has others.
        """
        if changed := changed_rewards(self.annotator, annotator_facts(self.cfg)):
            raise RunError(
                f"a worker reads other files of {', '.join(changed)} than the process that began the pool; "
                "give all machines the same files"
            )


class SamplingWorker:
    """An actor with a copy of the model, which samples shards.

    Args:
        begun: the pool as the driver began it.
    """

    def __init__(self, begun: Begun) -> None:
        self._problem: PalateError | None = None
        try:
            self._work = begun.work()
            self._source = self._loaded(begun)
        except PalateError as error:  # raised here, it would reach the driver as a traceback
            self._problem = error

    def _loaded(self, begun: Begun) -> Source:
        cfg, served = self._work.cfg, begun.served
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // cfg.workers))
        if served is not None:  # the device is the server's
            cfg = cfg.model_copy(update={"device": "cpu", "dtype": begun.dtype})
        model = loaded(cfg, self._work.date)
        if start_hash(model) != begun.weights:
            raise RunError(
                f"a worker loads {cfg.model} with other weights, or in another number format "
                f"({model.dtype}), than the process that began the pool; give all machines the same files, "
                "and --dtype"
            )
        if served is not None:  # the worker publishes nothing, so its directory of published weights is empty
            open_server(cfg, model, self._work.directory / "workers", served=served)
        return source_of(
            model, cfg.n, cfg.sampling, seed=self._work.seed, observe=unobserved, workers=cfg.workers
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Sample a shard into its file, unless that exists."""
        shard = int(batch["shard"][0])
        if self._problem is not None:
            return _reported(shard, error=self._problem)
        work = self._work
        if work.sampled(shard).exists() or work.path(shard).exists():
            return _reported(shard)
        try:
            with _trying(work, shard, "sampling"):
                entries = sample_shard(self._source, work.prompts, work.shards[shard])
                write_shard(work.sampled(shard), entries, work.prompts, work.columns)
        except PalateError as error:
            return _reported(shard, error=error)
        return _reported(shard, sum(len(c.token_ids) for e in entries for c in e.completions))


class ScoringWorker:
    """An actor with reward models, which scores sampled shards and writes the finished files.

    Args:
        begun: the pool as the driver began it.
    """

    def __init__(self, begun: Begun) -> None:
        self._problem: PalateError | None = None
        cfg = begun.cfg
        penalty, options = cfg.annotator_penalty, model_options(cfg)
        try:
            self._work = begun.work()
            begun.require_rewards()
            annotate = annotator(cfg.reward, missing_eos_penalty=penalty, excuse=_unexcused, **options)
            self._scoring = Scoring(annotate, scope_of(cfg))
        except PalateError as error:
            self._problem = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Score a shard, unless its finished file exists."""
        shard = int(batch["shard"][0])
        if batch["error"][0]:
            return {name: list(values) for name, values in batch.items()}
        if self._problem is not None:
            return _reported(shard, error=self._problem)
        work = self._work
        if work.path(shard).exists():
            return _reported(shard)
        try:
            with _trying(work, shard, "scoring"):
                work.finish(shard, self._scoring(read_shard(work.sampled(shard)), work.prompts))
        except PalateError as error:
            # A worker of a start that was just killed may have finished it, and removed the samples.
            return _reported(shard, error=None if work.path(shard).exists() else error)
        return _reported(shard, int(batch["tokens"][0]))


# ---- Inside ----------------------------------------------------------------------------------------


def _require_names(cfg: PoolConfig) -> None:
    """Raise ConfigError for data, models and rewards that are Python objects of this process."""
    objects = [value for value in (cfg.data, cfg.model, *cfg.reward) if isinstance(value, GIVEN)]
    if objects:
        raise ConfigError(
            f"ray is set, and {objects[0]} is an object of this process; give a file, a directory or a name, "
            "which the workers can read too"
        )


def _ray(cfg: PoolConfig) -> Any:
    # Ray reports usage to its makers by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if cfg.ray_address is None:
        # Who reaches Ray's ports can run code. On Linux they are open to the network by default; as on other
        # systems, they open on the loopback address, and ask for a secret that only this process knows.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            f"ray is set, but Ray is not installed ({error}); run `pip install palate[ray]`, or leave --ray "
            "out"
        ) from None
    return ray


@contextmanager
def _started(ray: Any, work: Work) -> Iterator[None]:
    """Start Ray on this machine, or connect to the cluster of `ray_address`; end what was started."""
    cfg = work.cfg
    own: dict[str, Any] = {
        "num_cpus": cfg.workers + cfg.scorers + 1,
        "object_store_memory": STORE,
        "include_dashboard": False,
    }
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if cfg.ray_address is None:
            ray.init(address="local", **own, **quiet)
        else:
            ray.init(address=cfg.ray_address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"Ray cannot be reached at {cfg.ray_address or 'this machine'} ({_first_line(error)}); start a "
            "cluster with `ray start`, or leave --ray-address out"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _pipeline(
    ray: Any, work: Work, facts: Facts, missing: list[int], *, scores: bool, served: Served | None
) -> Iterator[dict[str, Any]]:
    """Yield the numbers of each shard as it is done, in any order."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    cfg, gpus = work.cfg, int(ray.cluster_resources().get("GPU", 0))
    sampling_gpus = int(cfg.device != "cpu" and gpus >= cfg.workers and served is None)
    scoring_gpus = int(cfg.device != "cpu" and gpus >= cfg.workers * sampling_gpus + cfg.scorers)
    key = content_key(work.prompts)
    begun = Begun(
        cfg, work.directory.resolve(), work.date, Path.cwd(), key, facts.weights, facts.dtype,
        facts.annotator, served,
    )  # fmt: skip
    data = ray.data.from_items([{"shard": i} for i in missing], override_num_blocks=len(missing))

    def actors(count: int) -> Any:
        # Two tasks in flight: the next shard waits at its worker, and no more.
        return ray.data.ActorPoolStrategy(size=min(count, len(missing)), max_tasks_in_flight_per_actor=2)

    common = {"fn_constructor_args": (begun,), "batch_size": 1, "num_cpus": 1}
    data = data.map_batches(SamplingWorker, compute=actors(cfg.workers), num_gpus=sampling_gpus, **common)
    if scores:
        data = data.map_batches(ScoringWorker, compute=actors(cfg.scorers), num_gpus=scoring_gpus, **common)
    rows: Iterator[dict[str, Any]] = data.iter_rows()
    return rows


@contextmanager
def _trying(work: Work, shard: int, stage: str) -> Iterator[None]:
    """Count the tries of a shard in a file, which survives the worker.

    Raises:
        RunError: all of several workers died over it.
    """
    tries = work.sampled(shard).with_suffix(f".{stage}.tries")
    tries.parent.mkdir(exist_ok=True)
    with tries.open("a") as file:
        file.write(".")
    if tries.stat().st_size > TRIES:
        raise RunError(
            f"{TRIES} workers died while {stage} shard {shard} (prompts {work.shards[shard].start} to "
            f"{work.shards[shard].stop - 1}), perhaps for lack of memory; finished shards are kept, run the "
            "same command again with fewer --workers or a smaller --sampling-rows"
        )
    yield
    tries.unlink(missing_ok=True)


def _reported(shard: int, tokens: int = 0, *, error: PalateError | None = None) -> dict[str, Any]:
    """Return the row of a shard. An error travels as text, so that its message stays one sentence."""
    kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS]
    kind = kinds[0] if kinds else ""
    return {
        "shard": [shard],
        "tokens": [tokens],
        "error": ["" if error is None else str(error)],
        "kind": [kind],
    }


def _unexcused(*_: object) -> None:
    """Note nothing: rewards in workers are no functions of users."""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
