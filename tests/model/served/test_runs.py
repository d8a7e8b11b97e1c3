"""Whole runs whose completions come from a server."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from palate.cli import main
from palate.model.served import api
from palate.model.served.wire import GENERATE

STEPS, BATCH, N = 6, 3, 2
GAP = "sampling/sampling_logp_difference/max"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


REWARD = """
def letters(completions):
    return [float(sum(map(ord, c if isinstance(c, str) else c[0]["content"]))) for c in completions]
"""
"""A reward that hardly ever ties, so that every step learns."""


def words(tiny: str, output: Path, url: str, *more: str, method: str = "oaif") -> list[str]:
    data = output.parent / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Q{i}"}) + "\n" for i in range(12)))
    (output.parent / "rewards.py").write_text(REWARD)
    return ["run", method, "--model", tiny, "--data", str(data), "--output", str(output),
            "--dtype", "float32", "--device", "cpu", "--lr", "0.01",
            "--reward", f"{output.parent / 'rewards.py'}:letters",
            "--max-new-tokens", "6", "--steps", str(STEPS), "--batch-size", str(BATCH),
            "--fresh-prompts", "0", "--checkpoint-every", "2", "--rollout-retries", "1",
            "--rollouts", f"vllm:{url}", *more]  # fmt: skip


def weights(output: Path) -> bytes:
    return (output / "checkpoints" / f"step-{STEPS}" / "adapter_model.safetensors").read_bytes()


def rows(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_learned(output: Path, recorded: Any, tiny: str, ahead: str) -> None:
    """Check that a run has the weights of one that learns without a stop from the latest draw of each seed.

    They differ if the run drew a batch again from which it had learned.
    """
    whole = output.parent / "whole"
    assert main(words(tiny, whole, recorded.url, "--ahead", ahead)) == 0
    assert recorded.drawn == {}
    assert weights(whole) == weights(output)


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_samples_each_batch_from_its_version(tiny: str, serve: Any, tmp_path: Path, ahead: int) -> None:
    fake = serve()
    assert main(words(tiny, tmp_path / "run", fake.url, "--ahead", str(ahead))) == 0
    table = pq.read_table(tmp_path / "run" / "completions.parquet").to_pylist()
    versions = [row["policy_version"] for row in table]
    assert versions == [max(0, step - ahead) for step in range(STEPS) for _ in range(BATCH * N)]
    assert len(fake.asked) == len(table)
    gaps = [row[GAP] for row in rows(tmp_path / "run") if GAP in row]  # a step of ties alone has none
    assert gaps
    assert not (tmp_path / "run" / "published").exists()
    if not ahead:
        assert max(gaps) < 1e-3


def test_all_weights_can_be_trained(tiny: str, serve: Any, tmp_path: Path) -> None:
    fake = serve()
    assert main(words(tiny, tmp_path / "run", fake.url, "--no-lora", "--ahead", "1")) == 0
    assert [done for done, _ in fake.log] == ["reload"] * (STEPS - 1)  # the last batch comes from version 4
    assert [row for row in rows(tmp_path / "run") if GAP in row]


@pytest.mark.parametrize("ahead", ["0", "2"])
def test_a_server_that_is_killed_ends_the_run_in_a_sentence_and_the_run_resumes(
    tiny: str, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], ahead: str
) -> None:
    def dies(path: str, body: dict[str, Any], number: int) -> Any:
        if len(dying.asked) == 4 * BATCH * N + 2:  # in the middle of the fifth batch
            dying.server._server.shutdown()
            dying.server._server.server_close()
            raise OSError("gone")
        return None

    dying = serve(dies)
    capsys.readouterr()
    assert main(words(tiny, tmp_path / "killed", dying.url, "--ahead", ahead)) == 2
    said = capsys.readouterr().err
    assert f"the vLLM server at {dying.url} does not answer" in said
    assert "run the same command again (without --overwrite)" in " ".join(said.split())
    assert "Traceback" not in said
    other = serve()  # at another address, with other draws
    again = words(tiny, tmp_path / "killed", other.url, "--ahead", ahead, "--sampling-rows", "2")
    assert main(again) == 0  # the chunks stay as they were at the first start
    assert_learned(tmp_path / "killed", serve(recorded=dying.drawn | other.drawn), tiny, ahead)
    drawn = [body["sampling_params"]["seed"] for body in other.asked]
    assert len(drawn) <= (STEPS - 4) * BATCH * N  # finished batches are read from the journal


@pytest.mark.parametrize("ahead", ["0", "1"])
def test_a_killed_run_learns_from_each_batch_once(tiny: str, serve: Any, tmp_path: Path, ahead: str) -> None:
    fake = serve()
    again = words(tiny, tmp_path / "killed", fake.url, "--ahead", ahead)
    killed = subprocess.Popen([sys.executable, "-m", "palate", *again])
    while not (tmp_path / "killed" / "checkpoints" / "step-4").exists() and killed.poll() is None:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    fake.restart()  # a batch that is drawn again differs
    assert main(again) == 0
    assert_learned(tmp_path / "killed", serve(recorded=fake.drawn), tiny, ahead)
    seeds = [body["sampling_params"]["seed"] for body in fake.asked]
    assert len(seeds) - len(set(seeds)) <= (1 + int(ahead)) * BATCH * N  # the batches that were under way


def test_another_version_of_the_server_is_said_and_another_kind_refused(
    tiny: str, serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = words(tiny, tmp_path / "run", serve().url)
    assert main(run) == 0
    capsys.readouterr()
    newer = list(run)
    newer[newer.index("--steps") + 1] = "8"
    newer[newer.index("--rollouts") + 1] = f"vllm:{serve(version='0.33.0').url}"
    assert main(newer) == 0
    shown = capsys.readouterr()
    said = " ".join((shown.out + shown.err).split())
    assert "the run started with vLLM 0.32.0 and continues with vLLM 0.33.0" in said
    newer[newer.index("--rollouts") + 1] = "local"
    del newer[newer.index("--rollout-retries") : newer.index("--rollouts")]
    assert main(newer) == 2
    assert "the engine of the samples (--rollouts) changed" in " ".join(capsys.readouterr().err.split())


def test_policy_gradients_correct_for_the_engine(tiny: str, serve: Any, tmp_path: Path) -> None:
    more = ("--estimator", "rloo", "--n", "2", "--centre-on", "none")
    assert main(words(tiny, tmp_path / "run", serve().url, *more, method="rlhf")) == 0
    assert all(abs(row["rollouts/weight"] - 1) < 1e-3 for row in rows(tmp_path / "run") if "loss" in row)


def test_the_key_is_in_no_file(
    tiny: str, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very-secret-key")
    assert main(words(tiny, tmp_path / "run", serve().url)) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if b"very-secret-key" in path.read_bytes()]


@pytest.mark.parametrize("ahead", ["0", "1"])
def test_several_processes_send_their_parts(tiny: str, serve: Any, tmp_path: Path, ahead: str) -> None:
    fake, one = serve(salt=0), serve(salt=0)
    again = words(
        tiny, tmp_path / "two", fake.url, "--processes", "2", "--ahead", ahead, "--sampling-rows", "4"
    )
    ended = subprocess.run([sys.executable, "-m", "palate", *again], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert 1 < fake.server.most_at_once[GENERATE] <= 4
    assert main(words(tiny, tmp_path / "one", one.url, "--ahead", ahead)) == 0
    seeds = [sorted(body["sampling_params"]["seed"] for body in own.asked) for own in (fake, one)]
    assert seeds[0] == seeds[1]
    assert [done for done, _ in fake.log].count("load") == STEPS - int(ahead)
    tables = [pq.read_table(tmp_path / name / "completions.parquet").to_pylist() for name in ("two", "one")]
    first = [[row["completion"] for row in table[: BATCH * N]] for table in tables]
    assert first[0] == first[1]
