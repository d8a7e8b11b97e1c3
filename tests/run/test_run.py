from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from palate.config import RunConfig
from palate.errors import ConfigError, ModelError, RunError
from palate.methods.oaif import OAIFConfig
from palate.run import Display, Run
from palate.types import Completion, Group, Prompt


def rows(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def begin(directory: Path, **options: Any) -> Run:
    """A run that was opened and closed."""
    with Run(RunConfig(output=directory, **options), method="toy") as run:
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
        run.log_measurement(0, {"eval_loss": 2.0})
        run.log_measurement(4, {"eval_loss": 1.0})
    assert rows(run) == [{"step": 0, "eval_loss": 2.0}, {"step": 4, "eval_loss": 1.0}]
    assert run.measured == [{"eval_loss": 2.0}, {"eval_loss": 1.0}]


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
    fake = SimpleNamespace(perf_counter=lambda: clock.now, strftime=lambda form: "now")
    monkeypatch.setattr("palate.run.run.time", fake)
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


# ---- The directory ---------------------------------------------------------------------------------


def begun(directory: Path) -> Run:
    """A run that has logged a step."""
    with Run(RunConfig(output=directory), method="toy") as run:
        run.log(0, {"loss": 1.0})
        run.finish({})
    return run


def test_a_run_that_is_there_is_not_touched(tmp_path: Path) -> None:
    before = begun(tmp_path / "run")
    files = {path.name: path.read_bytes() for path in before.directory.iterdir()}
    with pytest.raises(RunError, match=r"run' holds a run already; give --output .* --overwrite"):
        begin(before.directory)
    assert {path.name: path.read_bytes() for path in before.directory.iterdir()} == files


def test_overwrite_replaces_a_run_whole(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run").directory
    (directory / "checkpoints" / "step-1").mkdir(parents=True)
    with Run(RunConfig(output=directory, overwrite=True), method="toy") as run:
        run.log(0, {"loss": 2.0})
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "metrics.jsonl"]
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_run_that_never_began_may_be_replaced(tmp_path: Path) -> None:
    # What a typing mistake leaves, found only once the data were read.
    begin(tmp_path / "run", seed=1)
    again = begin(tmp_path / "run", seed=2)
    assert json.loads((again.directory / "config.json").read_text())["config"]["seed"] == 2


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "files",
    [
        {"notes.txt": "mine"},
        {".hidden": "mine"},
        {"metrics.jsonl": "{}"},
        {"config.json": "not json"},
        {"config.json": "[]"},
        # A model has a config.json too, and is the last thing that may be deleted.
        {"config.json": '{"model_type": "llama", "hidden_size": 64}', "model.safetensors": "weights"},
    ],
)
def test_a_foreign_directory_is_never_touched(tmp_path: Path, overwrite: bool, files: dict[str, str]) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(RunError, match="mine' is there and holds no run; give --output another directory"):
        begin(directory, overwrite=overwrite)
    assert {path.name: path.read_text() for path in directory.iterdir()} == files


def test_a_checkpoint_as_output_is_not_deleted(tmp_path: Path, tiny: str) -> None:
    # The whole way: a real model directory.
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    with pytest.raises(RunError, match="holds no run"):
        begin(copy, overwrite=True)
    assert (copy / "model.safetensors").is_file()


def test_an_empty_directory_will_do(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert (begin(tmp_path / "run").directory / "config.json").is_file()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="holds no run"):
        begin(tmp_path / "run", overwrite=True)
    with pytest.raises(RunError, match=r"run/inside' cannot be written: Not a directory"):
        begin(tmp_path / "run" / "inside")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_link_to_a_run_says_why_it_cannot_be_replaced(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError, match=r"link' cannot be written: .*symbolic link"):
        begin(tmp_path / "link", overwrite=True)


def test_an_unknown_tracker_is_told_before_anything_is_replaced(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run").directory
    with pytest.raises(ConfigError, match="report_to 'tensorbord' is unknown"):
        begin(directory, overwrite=True, report_to=["tensorbord"])
    assert (directory / "summary.json").is_file()


# ---- Checkpoints -----------------------------------------------------------------------------------


class Saver:
    """Writes a file, or fails half-way."""

    def __init__(self, text: str = "weights", error: BaseException | None = None) -> None:
        self.text, self.error = text, error

    def save(self, directory: Path) -> None:
        (directory / "model").write_text(self.text)
        if self.error is not None:
            raise self.error


def test_a_checkpoint(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    path = run.save(Saver(), 5)
    assert path == run.directory / "checkpoints" / "step-5"
    assert (path / "model").read_text() == "weights"
    assert [p.name for p in path.parent.iterdir()] == ["step-5"]


def test_a_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    run = begin(tmp_path / "run")
    run.save(Saver("old"), 5)
    assert (run.save(Saver("new"), 5) / "model").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), RunError),
        (SafetensorError("No space left on device (os error 28)"), RunError),  # what safetensors makes of it
        (ValueError("a bug"), ValueError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_save_that_fails_leaves_what_was_there(
    tmp_path: Path, error: BaseException, raised: type[BaseException]
) -> None:
    run = begin(tmp_path / "run")
    run.save(Saver("good"), 5)
    for step in (5, 6):
        with pytest.raises(raised) as caught:
            run.save(Saver("bad", error), step)
        if raised is RunError:
            assert "cannot be written: No space left on device" in str(caught.value)
    checkpoints = run.directory / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-5"]  # nor any scratch
    assert (checkpoints / "step-5" / "model").read_text() == "good"


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


def test_a_replaced_run_comes_back_if_nothing_was_done_in_its_place(tmp_path: Path) -> None:
    first = RunConfig(output=tmp_path / "run")
    with Run(first, method="toy") as run:
        run.log(0, {"loss": 1.0})
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    with (
        pytest.raises(ZeroDivisionError),
        Run(RunConfig(output=tmp_path / "run", overwrite=True), method="toy"),
    ):
        _ = 1 / 0  # such as data that cannot be read
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept
    with Run(RunConfig(output=tmp_path / "run", overwrite=True), method="toy") as run:
        run.log(0, {"loss": 2.0})
    assert '"loss": 2.0' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_run_that_cannot_begin_leaves_the_one_it_would_replace(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run").directory
    cfg = OAIFConfig(data="x.jsonl", output=directory, overwrite=True, device="warp")
    with pytest.raises(ModelError, match="device"):
        Run(cfg, method="oaif")
    assert (directory / "summary.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_alone_makes_a_run(tmp_path: Path) -> None:
    class Model:
        def save(self, directory: Path) -> None:
            (directory / "model.safetensors").write_text("weights")

    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        run.save(Model(), 1)
    with pytest.raises(RunError, match="holds a run already"):
        begin(tmp_path / "run")
    with Run(RunConfig(output=tmp_path / "run", overwrite=True), method="toy") as run:
        run.save(Model(), 2)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
