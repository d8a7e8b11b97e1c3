"""Pools whose candidates come from a server: what a batch of requests meets, and what a restart repeats."""

from __future__ import annotations

import json
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

import palate.pooling.rays as rays
import palate.pooling.work as work
from palate.annotate import annotator
from palate.config import ModelConfig
from palate.errors import ConfigError, RunError
from palate.learn import Likelihood, Policy
from palate.loops import open_pool, scored_draw
from palate.methods.rft import RFTConfig
from palate.model import LoadedModel, load_model
from palate.model.batched import batched_logps
from palate.model.sampling import row_uniforms
from palate.model.served import api
from palate.model.served.weights import allowed, sample_gap
from palate.model.served.wire import GENERATE
from palate.pool import read_facts
from palate.pooling import Made, PoolConfig, make_pool
from palate.pooling.engine import Served, open_server
from palate.run import Display
from palate.run.seeds import seed_of
from palate.settings import load_config
from palate.testing import byte_tokenizer, tiny_model
from palate.types import Completion, Example, Group, Prompt

PROMPTS, N, NEW = 6, 2, 3

Make = Callable[..., Made]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def pool(tiny: str, tmp_path: Path) -> Make:
    """Makes a pool of 6 prompts with 2 completions, in three files, with the server at an address."""

    def make(url: str, rows: list[str] | None = None, display: Display | None = None, **options: Any) -> Made:
        data = tmp_path / "prompts.jsonl"
        texts = [f"Q{i}" for i in range(PROMPTS)] if rows is None else rows
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        flags = {
            "data": str(data), "model": tiny, "dtype": "float32", "device": "cpu", "fast": False,
            "n": N, "shard_size": 2, "max_new_tokens": NEW, "reward": ["length:2"],
            "output": tmp_path / "pool", "rollouts": url,
        }  # fmt: skip
        if url.startswith("http"):
            flags |= {"rollouts": f"vllm:{url}", "rollout_retries": 1}
        cfg = load_config(PoolConfig, file=None, flags=flags | options, python=True)
        return make_pool(cfg, display=display)

    return make


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(directory / "shards").to_pylist())


def seeds(fake: Any) -> list[int]:
    return [body["sampling_params"]["seed"] for body in fake.asked]


def whole(prompts: int) -> set[int]:
    """The seeds of a pool's requests, whatever samples it."""
    seed = seed_of(0, "sample", 0)
    ids = [Prompt(f"Q{i}").id for i in range(prompts)]
    return {int(row_uniforms(seed, own, 0, j, NEW)[0] * 2**53) for own in ids for j in range(N)}


def is_candidate(path: str, body: dict[str, Any]) -> bool:
    """True for a request for a completion, and not for a test of the server."""
    return path == GENERATE and body["sampling_params"]["min_tokens"] == 0


@pytest.fixture
def adapter(tiny: str, tmp_path: Path) -> str:
    """A directory with an adapter of the tiny model that is not zero."""
    cfg = ModelConfig.model_validate({"model": tiny, "dtype": "float32", "device": "cpu", "lora": True})
    model = load_model(cfg)
    for name, weight in model.trained():
        if "lora_B" in name:
            weight.data.normal_()
    model.save(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def assert_own(made: Made, directory: str) -> None:
    """Check that the log-probabilities are those of a model."""
    cfg = ModelConfig.model_validate({"model": directory, "dtype": "float32", "device": "cpu"})
    model = load_model(cfg, trainable=False)
    rows = rows_of(made.directory)
    records = [
        Example(Prompt(row["prompt"]), Completion(row["completion"], tuple(row["token_ids"]))) for row in rows
    ]
    for ours, row in zip(batched_logps(model, records, 512).rows(), rows, strict=True):
        assert ours.tolist() == pytest.approx(row["logps"], abs=1e-3)


# ---- A pool -----------------------------------------------------------------------------------------


def test_a_pool_has_one_seeded_request_for_each_completion(pool: Make, serve: Any, tiny: str) -> None:
    # A server that gets n > 1 with one seed, or no seed, repeats itself or cannot be asked again.
    others = threading.Event()

    def last_waits(path: str, body: dict[str, Any], number: int) -> None:
        if is_candidate(path, body):
            if len(fake.asked) > 2 * N:
                others.set()
            others.wait(30)

    fake = serve(last_waits)
    made = pool(fake.url, [f"Q{i % 4}" for i in range(PROMPTS)])  # equal rows count once
    # The next file is sampled while the last completions of one are awaited, so the server is never idle.
    assert others.is_set()
    assert fake.server.most_at_once[GENERATE] > 2 * N
    keys = Counter((row["prompt_row"], row["sample"]) for row in rows_of(made.directory))
    assert keys == Counter((row, sample) for row in range(4) for sample in range(N))
    assert len(set(seeds(fake))) == len(fake.asked) == 4 * N
    assert {body["sampling_params"]["n"] for body in fake.asked} == {1}
    assert {body["model"] for body in fake.asked} == {"base"}
    assert fake.log == []  # it has the weights already, so nothing is published
    assert_own(made, tiny)
    assert read_facts(made.directory).engine == "vLLM 0.32.0"


# ---- Bad rows ---------------------------------------------------------------------------------------


def test_prompts_that_the_server_cannot_take_or_refuses_are_rows(pool: Make, serve: Any, refuse: Any) -> None:
    (odd,) = byte_tokenizer().encode("z")

    def refuses(path: str, body: dict[str, Any], number: int) -> Any:
        refused = is_candidate(path, body) and odd in body["token_ids"]
        return refuse(400, "Token id 122 is out of vocabulary") if refused else None

    fake = serve(refuses, longest=60)
    made = pool(fake.url, ["x" * 60, "Q1", "z", "zz"], shard_size=1)
    bad = {row["prompt"]: row["error"] for row in rows_of(made.directory) if row["token_ids"] is None}
    assert bad.keys() == {"x" * 60, "z", "zz"}
    assert len([body for body in fake.asked if len(body["token_ids"]) == 1]) == 1  # others may pass
    assert "the vLLM server takes at most 60 in all; start it with a larger --max-mod" in bad["x" * 60]
    assert bad["z"] == "the vLLM server refuses the prompt: HTTP 400: Token id 122 is out of vocabulary"
    assert (made.summary["failed_prompts"], made.summary["completions"]) == (3, N)


def test_a_server_that_refuses_any_prompt_ends_a_pool_with_one_prompt_in_a_file(
    pool: Make, serve: Any, refuse: Any, tmp_path: Path
) -> None:
    # Elsewhere such a batch ends as a success without any result.
    def refuses(path: str, body: dict[str, Any], number: int) -> Any:
        return refuse(400, "stop is not supported") if is_candidate(path, body) else None

    with pytest.raises(RunError, match="refused to sample: HTTP 400: stop is not supported"):
        pool(serve(refuses).url, ["Q0", "Q1"], shard_size=1)
    assert list((tmp_path / "pool").glob("s*/*.parquet")) == []


def test_a_file_whose_prompts_are_all_refused_ends_the_pool_and_the_next_file_is_kept(
    pool: Make, serve: Any, refuse: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (odd,) = byte_tokenizer().encode("z")

    def refuses(path: str, body: dict[str, Any], number: int) -> Any:
        return refuse(400, "not this") if is_candidate(path, body) and odd in body["token_ids"] else None

    def kept(samples: Any) -> None:
        for begun in samples.begun.values():
            begun.drawn.groups()  # waits for them
        keep(samples)

    keep = work._Samples.keep
    monkeypatch.setattr(work._Samples, "keep", kept)
    with pytest.raises(RunError, match=r"all of 2 prompts fail: .*HTTP 400: not this"):
        pool(serve(refuses).url, ["z0", "z1", "Q2", "Q3"])
    assert [path.stem for path in (tmp_path / "pool").glob("s*/*.parquet")] == ["00001"]


# ---- Interrupted, and started again -----------------------------------------------------------------


def test_a_server_that_dies_ends_the_pool_in_a_sentence_and_the_pool_resumes(
    pool: Make, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(path: str, body: dict[str, Any], number: int) -> Any:
        if is_candidate(path, body) and len(dying.asked) > 5 * N:  # within the last file
            dying.die()
            raise OSError("gone")
        return None

    dying = serve(dies)
    with pytest.raises(RunError) as caught:
        pool(dying.url)
    said = str(caught.value)
    assert f"the vLLM server at {dying.url} does not answer" in said
    assert "finished shards are kept: start the server again, then run the same command again" in said
    shards = tmp_path / "pool" / "shards"
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert before
    # The samples of another file may be complete too, without their rewards.
    complete = {path.stem for path in (tmp_path / "pool").glob("s*/*.parquet")}
    other = serve(version="0.33.0")  # at another address, with other draws
    capsys.readouterr()
    made = pool(other.url, display=Display())
    said = " ".join("".join(capsys.readouterr()).split())
    assert "the pool was begun with vLLM 0.32.0 and continues with vLLM 0.33.0" in said
    assert read_facts(made.directory).engine == "vLLM 0.32.0, vLLM 0.33.0"
    assert before.items() <= {path: path.stat().st_mtime_ns for path in shards.iterdir()}.items()
    assert Counter((row["prompt_row"], row["sample"]) for row in rows_of(made.directory)) == Counter(
        (row, sample) for row in range(PROMPTS) for sample in range(N)
    )
    # The requests are those of a pool without a stop; those of complete files are not sent again.
    assert len(other.asked) == PROMPTS * N - len(complete) * 2 * N
    assert set(seeds(dying)) | set(seeds(other)) == whole(PROMPTS)


def test_complete_samples_outlive_an_error_in_scoring_and_the_server(
    pool: Make, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, prompts, samples = serve(), [f"Q{i}" for i in range(4)], []

    def fails(self: Any, entries: Any, _: Any) -> Any:
        next(iter(samples[0].begun.values())).entries()  # waits for the next file's samples
        fake.die()
        raise KeyboardInterrupt

    def noted(self: Any, shard: int) -> Any:
        samples.append(self)
        return began(self, shard)

    began = work._Samples.of
    with monkeypatch.context() as patch:
        patch.setattr(work._Samples, "of", noted)
        patch.setattr("palate.pooling.shards.Scoring.__call__", fails)
        with pytest.raises(KeyboardInterrupt):
            pool(fake.url, prompts)
    directory = tmp_path / "pool"
    assert len(list((directory / "sampled").glob("*.parquet"))) == 2
    # What SIGKILL leaves while an adapter and a file are written.
    (directory / "published" / ".palate-0-1.part").mkdir(parents=True)
    (directory / "sampled" / ".00001.part").touch()
    assert pool(fake.url, prompts).summary["completions"] == 4 * N  # without the server
    assert not (directory / "published").exists()
    assert list((directory / "sampled").iterdir()) == []


def test_an_engine_that_has_sampled_is_kept(pool: Make, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def start(python: Any, arguments: Any, log: Path, *, takes_weights: bool) -> None:
        started.extend([list(arguments)[:2], log.name, takes_weights])
        raise RunError("no vLLM here")

    monkeypatch.setattr("palate.model.served.connect.ServerProcess", start)
    with pytest.raises(RunError, match="no vLLM here"):
        pool("vllm")
    # A server beside the pool has the model's files, and lets nobody change its weights.
    assert started == [["--model", tiny], "vllm.log", False]
    monkeypatch.setattr(work, "shown", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pool("local")
    with pytest.raises(RunError, match=r"engine of the pool in .* was local, but --rollouts is vllm, whose"):
        pool("vllm")


# ---- Other models -----------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> str:
    return tiny_model(tmp_path / "other", chat=True, initializer_range=1.0)


def test_a_server_with_another_model_is_refused_at_the_start(pool: Make, serve: Any, other: str) -> None:
    with pytest.raises(
        ConfigError, match=r"serves another model: .* start it with the same model and --dtype"
    ):
        pool(serve(model=other).url)


def shifted(fake: Any, *gaps: float) -> Callable[[str, dict[str, Any], int], Any]:
    """Replies to candidates whose first log-probabilities differ from the model's."""

    def override(path: str, body: dict[str, Any], number: int) -> Any:
        if not is_candidate(path, body):
            return None
        reply = fake.reply(path, body)
        for entry, gap in zip(reply["choices"][0]["logprobs"]["content"], gaps, strict=False):
            entry["logprob"] -= gap
        return reply

    return override


def test_a_server_that_gets_a_related_model_is_refused_before_its_file_is_written(
    pool: Make, serve: Any, tmp_path: Path
) -> None:
    # The tests at the start have no prompt, and there a checkpoint differs little from an earlier one.
    def changes(path: str, body: dict[str, Any], number: int) -> Any:
        return related(path, body, number) if len(fake.asked) > 2 * N else None

    fake = serve(changes)
    related = shifted(fake, *[0.05] * NEW)
    with pytest.raises(
        RunError, match=r"samples with another model than .*: the .* \d+ sampled tokens differ"
    ):
        pool(fake.url)
    assert len(list((tmp_path / "pool").glob("s*/*.parquet"))) <= 1


def test_many_tokens_show_smaller_differences_in_bfloat16_than_few(tiny: str) -> None:
    cfg = ModelConfig.model_validate({"model": tiny, "dtype": "bfloat16", "device": "cpu", "fast": False})
    model = load_model(cfg, trainable=False)
    prompts = [Prompt(f"Q{i}") for i in range(16)]
    ids = tuple(byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz" * 4))
    records = [Example(prompt, Completion("", ids[:32])) for prompt in prompts]
    logps = [tuple(row.tolist()) for row in batched_logps(model, records, 2048).rows()]

    def compared(shift: float) -> tuple[float, int]:
        served = [Completion("", ids, logps=tuple(logp - shift for logp in own)) for own in logps]
        return sample_gap(model, [Group(p, (c,)) for p, c in zip(prompts, served, strict=True)])

    gap, tokens = compared(0.1)
    assert 128 <= tokens <= 512
    assert compared(0.0)[0] < allowed(model, tokens) < gap < allowed(model, 16)


# ---- Workers, options, readers ----------------------------------------------------------------------


class OneWorker:
    """Ray's functions that a pool calls, with one worker of each kind in this process."""

    DataContext = SimpleNamespace(get_current=SimpleNamespace)
    exceptions = SimpleNamespace(RayError=ArithmeticError)

    def __init__(self) -> None:
        self.data, self.gpus = self, []  # type: ignore[var-annotated]
        self._stages: list[Callable[[dict[str, Any]], dict[str, Any]]] = []

    def init(self, **options: Any) -> None: ...

    def shutdown(self) -> None: ...

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": 8.0}

    def ActorPoolStrategy(self, **options: Any) -> None: ...  # noqa: N802

    def from_items(self, rows: list[dict[str, int]], **_: Any) -> OneWorker:
        self._rows = rows
        return self

    def map_batches(self, kind: Any, *, fn_constructor_args: Any, num_gpus: int, **_: Any) -> OneWorker:
        self._stages.append(kind(*fn_constructor_args))
        self.gpus.append(num_gpus)
        return self

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        for row in self._rows:
            batch: dict[str, Any] = {"shard": [row["shard"]]}
            for stage in self._stages:
                batch = stage(batch)
            yield {name: values[0] for name, values in batch.items()}


def test_workers_talk_to_the_server_of_the_pool(
    pool: Make, serve: Any, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, ray = serve(salt=0), OneWorker()
    monkeypatch.setattr(rays, "_ray", lambda cfg: ray)
    held: list[weakref.ref[Any]] = []

    def noted(cfg: PoolConfig, date: str) -> LoadedModel:
        model = loaded(cfg, date)
        held.append(weakref.ref(model.network))
        return model

    loaded, ray.init = work.loaded, lambda **_: held.append(held.pop()())  # type: ignore[method-assign]
    monkeypatch.setattr(work, "loaded", noted)
    made = pool(fake.url, ["Q0", "Q1"], ray=True, model=adapter, device="auto", sampling_rows=4)
    assert held == [None]  # the process that began the pool has freed its model before the workers start
    assert [done for done, _ in fake.log] == ["load", "unload"]  # by that process
    assert {body["model"] for body in fake.asked} == {fake.log[0][1]}
    most = fake.server.most_at_once[GENERATE]
    assert 0 < most <= 2 + 1  # its part of the requests at once, and a test of the server
    assert ray.gpus[0] == 0  # the device is the server's
    assert not (made.directory / "published").exists()
    assert set(seeds(fake)) == whole(2)
    assert read_facts(made.directory).engine == "vLLM 0.32.0"


def test_a_worker_that_reaches_another_server_refuses(serve: Any, tiny: str, tmp_path: Path) -> None:
    given = {"data": "-", "model": tiny, "device": "cpu", "dtype": "float32", "fast": False}
    cfg = PoolConfig.model_validate(given | {"rollouts": f"vllm:{serve().url}"})
    with pytest.raises(RunError, match=r"a worker reaches vLLM 0.32.0, but .* vLLM 0.31.0"):
        open_server(cfg, work.loaded(cfg, "2026-11-28"), tmp_path, served=Served("vLLM 0.31.0", "base"))


def test_a_server_beside_the_pool_is_refused_with_workers(pool: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"others; start a server that all of them reach and give --rollouts"
    ):
        pool("vllm", ray=True)


def test_a_run_allows_a_servers_rounding_only_in_the_round_of_the_pool(
    pool: Make, serve: Any, tiny: str, make_policy: Callable[..., Policy]
) -> None:
    fake, policy = serve(), make_policy(model={"lora": True})
    fake.override = shifted(fake, 0.02)
    prompts = [Prompt("Q0"), Prompt("Q1")]
    made = pool(fake.url, ["Q0", "Q1"])
    given = {"data": "-", "model": tiny, "reward": ["length:2"], "temperature": 1.0, "max_new_tokens": NEW}
    cfg = RFTConfig.model_validate(given | {"n": N, "pool": made.directory})
    run: Any = SimpleNamespace(
        require_same=lambda *fact: None, remember=lambda name, fact: fact, seed=lambda *words: 0,
        display=SimpleNamespace(say=print),
    )  # fmt: skip
    candidates = open_pool(policy, cfg, run, n=N, sampling=cfg.sampling_of(0))
    annotate = annotator(cfg.reward)

    def learned(round_: int) -> dict[str, float]:
        groups = scored_draw(policy, annotate, prompts, N, cfg.sampling_of(0), run, round_, candidates)
        return policy.update([Example(g.prompt, c) for g in groups for c in g.completions], Likelihood())

    assert learned(0)["sampling/sampling_logp_difference/max"] == pytest.approx(0.02, abs=1e-3)
    assert learned(1)["sampling/sampling_logp_difference/max"] < 1e-3
    assert not policy.served
