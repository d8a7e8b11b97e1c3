from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from palate.config import RunConfig, Sampling
from palate.errors import NonFiniteError, RunError
from palate.learn import Needs, Policy
from palate.methods.oaif import OAIFConfig
from palate.model import Outputs
from palate.run import Display, Run
from palate.rundir import read_status
from palate.types import Completion, Demonstration, Group, Prompt

SAFELY = r"run the same command again \(without --overwrite\)"


def rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def begin(directory: Path, **options: Any) -> Run:
    """A run that was opened and closed."""
    with Run(RunConfig(output=directory, **options), method="toy") as run:
        list(run.steps(0))
        return run


# ---- config.json -----------------------------------------------------------------------------------


def test_config_comes_first_and_has_everything(tmp_path: Path) -> None:
    cfg = OAIFConfig(data="x.jsonl", output=tmp_path / "run", seed=7, loss="ipo")
    Run(cfg, method="oaif")  # nothing has been done yet
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["method"] == "oaif"
    assert written["config"] == cfg.model_dump(mode="json")  # defaults too
    assert written["config"].keys() == OAIFConfig.model_fields.keys()
    assert written["config"]["beta"] == 1.0  # resolved: ipo's, not the field's default
    assert written["config"]["seed"] == 7
    assert written["versions"]["torch"] == importlib.metadata.version("torch")
    assert {"palate", "torch", "transformers", "peft"} <= written["versions"].keys()
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["machine"]["instruction_set"]
    assert written["python"].startswith("3.")
    assert written["started"]


def test_a_config_can_be_read_back(tmp_path: Path) -> None:
    cfg = OAIFConfig(data="x.jsonl", output=tmp_path / "run", map={"prompt": "q"}, stop=("a",))
    Run(cfg, method="oaif")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert OAIFConfig(**written["config"]) == cfg


def test_the_directory_is_named_after_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Run(RunConfig(), method="oaif").directory == Path("runs/oaif")
    assert (tmp_path / "runs" / "oaif" / "config.json").is_file()


# ---- metrics.jsonl ---------------------------------------------------------------------------------


def test_a_row_per_step(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for step in run.steps(2):
            run.log(step, {"loss": 0.5 - step}, {"objective/scores": step})
            assert len(rows(run)) == step + 1  # there at once, for those who follow the file
    first, second = rows(run)
    assert (first["step"], first["loss"], first["objective/scores"]) == (1, 0.5, 0)
    assert (second["step"], second["loss"], second["objective/scores"]) == (2, -0.5, 1)


def test_tokens_are_counted_over_the_run(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for step, tokens in enumerate([10, 0, 5]):
            run.log(step, {"num_tokens": tokens} if tokens else {})
    assert [row.get("num_tokens") for row in rows(run)] == [10, None, 15]


def test_numbers_of_no_step_are_kept(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        assert run.measure("pairs", lambda: {"eval_loss": 2.0}) == {"eval_loss": 2.0}
        for _ in run.steps(4):
            pass
        run.measure("pairs", lambda: {"eval_loss": 1.0})
    assert rows(run) == [{"step": 0, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}]
    assert run.measured == [{"eval_loss": 2.0}, {"eval_loss": 1.0}]


def test_a_measurement_is_made_once(tmp_path: Path) -> None:
    counted = itertools.count(1)
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for _ in range(2):
            assert run.measure("pairs", lambda: {"eval_loss": next(counted)}) == {"eval_loss": 1}
    assert rows(run) == [{"step": 0, "eval_loss": 1}]
    assert run.measured == [{"eval_loss": 1}]


def test_each_stage_has_its_own_measurements(tmp_path: Path) -> None:
    # The end of one stage and the start of the next are at the same step, and not the same numbers.
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for stage in range(2):
            run.measure(f"round {stage}", lambda stage=stage: {"eval_loss": 10 * stage})
            for step in run.steps(2):
                run.log(step)
                if step == 1:
                    run.measure(f"round {stage}", lambda stage=stage: {"eval_loss": 10 * stage + 1})
            run.measure(f"round {stage}", lambda: pytest.fail("it is known"))
    assert [found["eval_loss"] for found in run.measured] == [0, 1, 10, 11]
    assert [row["step"] for row in rows(run) if "eval_loss" in row] == [0, 2, 2, 4]


def test_steps_are_counted_over_the_stages(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for count in (2, 3):
            assert [(step, run.log(step))[0] for step in run.steps(count)] == list(range(count))
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5]


def test_every_line_is_json_whatever_the_number(tmp_path: Path) -> None:
    # Python writes NaN and Infinity, which jq, JavaScript and pandas do not read.
    def refuse(word: str) -> None:
        raise AssertionError(word)

    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        run.log(0, {"a": math.nan, "b": math.inf, "c": 1.0})
        run.finish({"win_rate": math.nan, "kl": -math.inf, "pairs": 3})
    text = (run.directory / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=refuse)
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    text = (run.directory / "summary.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"win_rate": None, "kl": None, "pairs": 3}


def test_summary(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        run.finish({"seconds": 1.5, "text": "naïve"})
    assert json.loads((run.directory / "summary.json").read_text(encoding="utf-8")) == {
        "seconds": 1.5,
        "text": "naïve",
    }
    assert not list(run.directory.glob("*.part"))


# ---- The clock -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes when it is told to."""
    clock = SimpleNamespace(now=100.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr("palate.run.clock.time", fake)
    return clock


def test_time_goes_to_the_stage_that_reports_it(tmp_path: Path, clock: SimpleNamespace) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        clock.now += 50  # loading; no step's time
        for step in run.steps(2):
            for stage, seconds, amount in (("sample", 2, 80), ("sample", 3, 20), ("annotate", 1, 4)):
                clock.now += seconds
                run.observe(stage, amount)
            clock.now += 4 * (step + 1)
            run.observe("learn", 100)
            clock.now += 0.5  # what nobody reports is the step's all the same
            run.log(step)
            clock.now += 7  # saving, say
        assert run.seconds == pytest.approx(50 + 2 * (2 + 3 + 1 + 0.5 + 7) + 4 + 8)
    first, second = rows(run)
    times = {"time/sample": 5.0, "time/annotate": 1.0, "time/learn": 4.0, "step_time": 10.5}
    assert {key: first[key] for key in times} == times
    assert first["sampling/tokens_per_second"] == 100 / 5
    assert (second["time/learn"], second["step_time"]) == (8.0, 14.5)


def test_a_step_without_sampling_has_no_sampling_speed(tmp_path: Path, clock: SimpleNamespace) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for step in run.steps(1):
            clock.now += 1
            run.observe("learn", 10)
            run.log(step)
    assert set(rows(run)[0]) == {"step", "time/learn", "step_time"}


def test_the_display_is_told(tmp_path: Path, clock: SimpleNamespace) -> None:
    seen: list[Any] = []

    class Watching(Display):
        def expect(self, steps: int) -> None:
            seen.append(("expect", steps))

        def working(self, stage: str, speed: float) -> None:
            seen.append((stage, speed))

        def metrics(self, row: Any, samples: Any) -> None:
            seen.append((row["step"], samples))

    group = Group(Prompt("Q"), (Completion("a", (1,)),))
    with Run(RunConfig(output=tmp_path / "run"), method="toy", display=Watching(quiet=True)) as run:
        for step in run.steps(1):
            clock.now += 2
            run.observe("sample", 10)
            run.log(step, samples=[group])
    assert seen == [("expect", 1), ("sample", 5.0), (1, [group])]


# ---- Saving and finishing --------------------------------------------------------------------------


def test_a_policy_is_saved_where_it_is(tmp_path: Path, make_policy: Callable[..., Policy]) -> None:
    run, policy = begin(tmp_path / "run"), make_policy(model={"fast": False})
    assert run.save(policy) == run.directory / "checkpoints" / "step-0"
    assert (run.directory / "checkpoints" / "step-0" / "model.safetensors").is_file()


def test_a_run_ends_with_the_checkpoint_of_its_last_step(toy: Any) -> None:
    run, policy = toy(steps=3, checkpoint_every=2)
    assert sorted(p.name for p in (run.directory / "checkpoints").iterdir()) == ["step-2", "step-3"]
    saved = load_file(run.directory / "checkpoints" / "step-3" / "model.safetensors")
    live = policy.model.network.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.items())


def test_a_step_that_is_not_done_is_not_saved(tmp_path: Path, make_policy: Callable[..., Policy]) -> None:
    # Where such a checkpoint were taken up again, nobody could say.
    policy = make_policy(model={"fast": False})
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        for _ in run.steps(1):
            with pytest.raises(AssertionError):
                run.save(policy)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_completions_are_a_table(toy: Any) -> None:
    run, _ = toy(steps=2)
    table = pyarrow.parquet.read_table(run.directory / "completions.parquet").to_pylist()
    assert [row["place"] for row in table] == ["step 1"] * 4 + ["step 2"] * 4
    assert [row["completion"] for row in table] == toy.asked
    assert [row["reward"] for row in table] == [float(sum(map(ord, text)) % 101) for text in toy.asked]


def test_only_completions_of_the_policy_are_exported(tmp_path: Path) -> None:
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        run.journal.keep_completions("a", 0, [Prompt("Q")], [[Completion("answer", (1,))]])
        verdict = [[Completion("the first", (2,))]]
        run.journal.keep_completions("b", 0, [Prompt("Which is better?")], verdict, purpose="verdict")
        run.finish({})
    table = pyarrow.parquet.read_table(run.directory / "completions.parquet").to_pylist()
    assert [row["completion"] for row in table] == ["answer"]


def test_prompts_of_both_kinds_make_one_table(tmp_path: Path) -> None:
    chat = Prompt(({"role": "user", "content": "näive"},))
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        kept = [[Completion("a", (1,))], [Completion("b", (2,))]]
        run.journal.keep_completions("k", 0, [Prompt("Q"), chat], kept)
        run.finish({}, [{"prompt": "Q", "before": "a"}])
    table = pyarrow.parquet.read_table(run.directory / "completions.parquet").to_pylist()
    assert [row["prompt"] for row in table] == ["Q", '[{"role": "user", "content": "näive"}]']
    assert json.loads((run.directory / "samples.jsonl").read_text()) == {"prompt": "Q", "before": "a"}


def test_what_a_run_must_not_change(tmp_path: Path) -> None:
    for _ in range(2):
        with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
            run.require_same("the prompts", "a" * 32, "the data")
            run.log(0)
    with (
        pytest.raises(RunError, match=r"the data changed since .* started \(hash b{12}, was a{12}\)"),
        Run(RunConfig(output=tmp_path / "run"), method="toy") as run,
    ):
        run.require_same("the prompts", "b" * 32, "the data")


# ---- When something goes wrong ---------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_is_told_in_one_sentence(tmp_path: Path) -> None:
    run = Run(RunConfig(output=tmp_path / "run"), method="toy")

    def work() -> None:
        with run:
            run._metrics._file = Path("/dev/full").open("a")  # noqa: SIM115 - the run closes it
            run.log(0, {"loss": 1.0})

    told = r"metrics\.jsonl' cannot be written: No space left on device; the journal .*" + SAFELY
    with pytest.raises(RunError, match=told):
        work()
    # The row is safe, and the run is in nobody's hands any more.
    begin(tmp_path / "run")
    assert read_status(tmp_path / "run").state == "finished"


def test_a_status_that_cannot_be_written_lets_go_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    run = Run(RunConfig(output=tmp_path / "run"), method="toy")  # held on to, as by a notebook

    def work() -> None:
        with run:
            run.log(0)
            monkeypatch.setattr("palate.run.progress.write_status", full)

    with pytest.raises(RunError, match=r"status\.json' cannot be written: No space left"):
        work()
    monkeypatch.undo()
    begin(tmp_path / "run")


def test_metrics_that_cannot_be_restored_are_told(tmp_path: Path) -> None:
    begin(tmp_path / "run").directory.joinpath("metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(RunError, match=r"metrics\.jsonl' cannot be written"):
        begin(tmp_path / "run")


def test_what_was_trained_can_be_used_when_its_run_is_over(toy: Any) -> None:
    # In a notebook: `outcome = palate.train(...)`, and then a look at what it says.
    _, policy = toy(steps=1)
    (group,) = policy.snapshot().sample([Prompt("Hi")], 2, Sampling(max_new_tokens=3), seed=0)
    assert len(group.completions) == 2
    assert policy.logps([group]).values.shape[0] == 2
    assert policy.snapshot().logps([group], kept=True).values.shape[0] == 2


class Broken:
    """A loss that is no number from some step on."""

    needs = Needs()

    def __call__(self, outputs: Outputs, records: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert outputs.logps is not None
        return outputs.logps.sum() * math.nan, {}


def test_a_batch_that_is_not_finite_is_written_down(
    tmp_path: Path, make_policy: Callable[..., Policy]
) -> None:
    policy = make_policy(model={"fast": False})
    before = [p.detach().clone() for _, p in policy.model.trained()]
    example = policy.model.codec.example(Demonstration(Prompt("Q"), "näive"))
    run = Run(RunConfig(output=tmp_path / "run"), method="toy")

    def work() -> None:
        with run:
            run.attach(policy)
            for step in run.steps(5, policy):
                run.log(step, policy.update([example], Broken()))

    with pytest.raises(NonFiniteError):
        work()
    assert [row["skipped_updates"] for row in rows(run)] == [1, 2]
    assert [row["step"] for row in rows(run)] == [1, 2]
    (written,) = [json.loads(line) for line in (run.directory / "nonfinite.jsonl").read_text().splitlines()]
    assert written == {
        "prompt": "Q",
        "completion": "näive",
        "token_ids": list(example.completion.token_ids),
    }
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, policy.model.trained(), strict=True))
    status = read_status(run.directory)
    assert (status.state, status.step, status.steps) == ("failed", 2, 5)
    assert "the 3rd time in a row" in status.reason


# ---- Seeds -----------------------------------------------------------------------------------------


def test_seeds_by_purpose(tmp_path: Path) -> None:
    purposes = [("sample", 0), ("sample", 1), ("sample", 11), ("prompts",), ("adapter",), ("evaluate",)]
    run = begin(tmp_path / "a", seed=3)
    seeds = [run.seed(*names) for names in purposes]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [run.seed(*names) for names in purposes]  # nothing is used up
    assert seeds == [begin(tmp_path / "b", seed=3).seed(*names) for names in purposes]
    other = [begin(tmp_path / "c", seed=4).seed(*names) for names in purposes]
    assert all(one != two for one, two in zip(seeds, other, strict=True))
    assert all(0 <= seed < 2**48 for seed in seeds)  # fits torch, numpy and JavaScript alike


def test_a_runs_seed_and_a_purpose_do_not_run_together(tmp_path: Path) -> None:
    one, two = begin(tmp_path / "a", seed=1), begin(tmp_path / "b", seed=11)
    assert one.seed(1, "x") != two.seed("x")
    assert one.seed("a", 12) != one.seed("a", 1, 2)


def test_seeds_are_the_same_in_every_version(tmp_path: Path) -> None:
    # A stored run is repeated by its seed: another number here changes every result ever published.
    # By hand: python -c 'from hashlib import blake2b; print(int.from_bytes(blake2b(b"0:sample:0",
    # digest_size=6).digest(), "little"))'
    assert begin(tmp_path / "run", seed=0).seed("sample", 0) == 71793128202076


def test_seeds_look_random(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    bits = "".join(f"{run.seed('sample', step):048b}" for step in range(200))
    share = bits.count("1") / len(bits)
    assert abs(share - 0.5) < 4 * 0.5 / math.sqrt(len(bits))
    changes = sum(a != b for a, b in itertools.pairwise(bits)) / (len(bits) - 1)
    assert abs(changes - 0.5) < 4 * 0.5 / math.sqrt(len(bits))


def test_a_summary_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("palate.run.exports._write", full)
    with (
        pytest.raises(
            RunError, match=r"summary\.json' cannot be written: No space left on device; .*" + SAFELY
        ),
        Run(RunConfig(output=tmp_path / "run"), method="toy") as run,
    ):
        run.finish({})


def test_a_run_that_goes_on_beyond_its_end_takes_back_what_told_of_it(toy: Any) -> None:
    run, _ = toy(steps=2)
    exports = [run.directory / name for name in ("summary.json", "completions.parquet")]
    assert all(path.is_file() for path in exports)
    (run.directory / "samples.jsonl").write_text("{}")

    def look(run: Run, step: int) -> None:
        assert not any(path.exists() for path in (*exports, run.directory / "samples.jsonl"))

    toy.after = look
    toy(steps=3)
    assert all(path.is_file() for path in exports)
    (run.directory / "summary.json").write_text("[")  # broken, it is written anew
    toy.after = lambda run, step: None
    toy(steps=3)
    assert json.loads((run.directory / "summary.json").read_text())["steps"] == 3
