"""The real program, in this process, on real (tiny) models and files: what a user gets for what is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoModelForCausalLM

import palate
from palate.cli import main

TINY = "--model tiny --device cpu --dtype float32"
FILES = {
    "prompts.jsonl": '{"prompt": "one"}\n{"prompt": "two"}\n',
    "pairs.jsonl": "".join(
        f'{{"prompt": "{i}", "chosen": "yes {i}", "rejected": "no {i}"}}\n' for i in range(4)
    ),
    "chat.jsonl": '{"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]}\n',
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "cut.jsonl": '{"prompt": "one"}\n{"prompt": "tw',
    "question.jsonl": '{"prompt": "one"}\n{"question": "two"}\n',
    "long.jsonl": f'{{"prompt": "one"}}\n{{"prompt": "{"x" * 300}"}}\n',
    "long_pair.jsonl": f'{{"prompt": "{"x" * 300}", "chosen": "a", "rejected": "b"}}\n',
    "tab.yaml": "data: prompts.jsonl\n\tbeta: 1\n",
    "near.yaml": "data: prompts.jsonl\nbatchsize: 2\n",
    "run.yaml": "data: prompts.jsonl\nreward: rewards.py:letters\nsteps: 2\nbatch-size: 2\nmax_new_tokens: 4",
    "no_model/notes.txt": "mine",
    "foreign/notes.txt": "mine",
    "run_of.yaml": "run: begun\n",
    "lora.yaml": "lora: true\n",
    "begun/config.json": '{"method": "oaif", "config": {"model": "tiny"}, "versions": {}}',
    "odd/config.json": '{"method": "oaif", "config": {"dtype": "float8"}, "versions": {}}',
    "lost/config.json": '{"method": "oaif", "config": {"model": "./gone"}, "versions": {}}',
    "foreign_step/config.json": '{"method": "oaif", "config": {"model": "tiny"}, "versions": {}}',
    "foreign_step/checkpoints/step-1/notes.txt": "mine",
    "broken_model/config.json": '{"model_type": ',
    "broken_import.py": "import no_such_package\n",
    "rewards.py": """
def letters(completions, completion_ids):
    return [sum(map(ord, str(c))) % 101 + len(ids) / 7 for c, ids in zip(completions, completion_ids)]
def boom(completions):
    raise KeyError("the\\x1b[31m\\nkey")
def few(completions):
    return [1.0]
def words(completions):
    return ["good"] * len(completions)
def nothing(completions):
    return [None] * len(completions)
""",
}


@pytest.fixture
def folder(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with good and bad files, and the tiny model as `tiny`."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "tiny").symlink_to(tiny)
    shutil.copytree(tiny, tmp_path / "cut_model")
    shutil.copytree(tiny, tmp_path / "lost/checkpoints/step-1")
    weights = tmp_path / "cut_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("rewards", None)


def short(data: str, reward: str = "rewards.py:letters", method: str = "oaif") -> str:
    """A run of two small steps."""
    sampled = f"--reward {reward} --max-new-tokens 4" if reward else "--max-new-tokens 4"
    return f"run {method} {TINY} --data {data} {sampled} --steps 2 --batch-size 2"


# ---- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        # Commands, methods and flags.
        ("run oaiff --data prompts.jsonl", ["unknown method 'oaiff'", "did you mean 'oaif'?"]),
        ("trian oaif", ["unknown command 'trian'", "palate --help"]),
        ("run dpo --data pairs.jsonl --betta 1", ["unknown flag --betta", "did you mean --beta?"]),
        (f"{short('prompts.jsonl')} --lerning-rate 1", ["unknown flag --lerning-rate", "did you mean --lr?"]),
        (f"{short('prompts.jsonl')} --epochs 1", ["unknown flag --epochs", "did you mean --steps?"]),
        (f"{short('prompts.jsonl')} --beta -0.1", ["--beta is -0.1", "a number greater than 0"]),
        (f"{short('prompts.jsonl')} --n 1", ["--n is 1", "at least 2"]),
        (f"{short('prompts.jsonl')} --loss dpoo", ["--loss is 'dpoo'", "did you mean dpo?"]),
        (f"{short('prompts.jsonl')} --min-new-tokens 9", ["min_new_tokens is 9, but max_new_tokens is"]),
        (f"run oaif {TINY} --reward length:3", ["data is missing, give --data"]),
        # Configuration files.
        ("run oaif --config near.yaml", ["`batchsize` (line 2 of near.yaml)", "did you mean `batch_size`?"]),
        ("run oaif --config tab.yaml", ["tab.yaml is not valid YAML at line 2, column 1"]),
        ("chat r --config run_of.yaml", ["unknown key `run` (line 1 of run_of.yaml)"]),
        ("sample --config lora.yaml", ["unknown key `lora` (line 1 of lora.yaml)"]),
        ("sample --lora-rank 4 --prompt a", ["unknown flag --lora-rank"]),
        ("run oaif --config no.yaml", ["config file no.yaml does not exist"]),
        # Data.
        (short("promts.jsonl"), ["promts.jsonl does not exist", "Did you mean prompts.jsonl?"]),
        (short("empty.jsonl"), ["empty.jsonl has no rows"]),
        (short("blank.jsonl"), ["blank.jsonl has no rows"]),
        (short("cut.jsonl") + " --strict", ["cut.jsonl:2 is not JSON", "the file may be incomplete"]),
        (short("question.jsonl") + " --strict", ["question.jsonl:2: prompt is missing", "prompt=question"]),
        (short("long.jsonl") + " --strict", ["long.jsonl:2: the prompt has 318 tokens", "no room for 4 new"]),
        (short("long_pair.jsonl", "", "dpo"), ["long_pair.jsonl:1: the prompt has 318 tokens"]),
        (short("prompts.jsonl", "", "dpo"),
         ["no row can be used", "prompts.jsonl:1: chosen is missing", "Preference pairs need the columns"]),
        (short("everyday", "", "dpo"), ["everyday: no row can be used. 400 x chosen is missing"]),
        (f"{short('prompts.jsonl')} --map prompt=qestion", ["no row has the column 'qestion'"]),
        (f"{short('prompts.jsonl')} --eval-data no.jsonl", ["no.jsonl does not exist"]),
        (f"{short('pairs.jsonl', '', 'ipo')} --eval-data prompts.jsonl", ["prompts.jsonl:1: chosen is mis"]),
        # Models.
        ("run oaif --data prompts.jsonl --reward length:3 --model no_model",
         ["directory 'no_model' holds no model", "found notes.txt"]),
        ("run oaif --data prompts.jsonl --reward length:3 --model ./none", ["'./none' does not exist"]),
        ("run dpo --data pairs.jsonl --model broken_model", ["'broken_model' could not be loaded"]),
        ("run dpo --data pairs.jsonl --model cut_model", ["'cut_model' could not be loaded", "complete?"]),
        ("run dpo --data pairs.jsonl --model tiny --device cdua", ["device 'cdua' is unknown", "mean cuda?"]),
        (f"{short('prompts.jsonl')} --max-length 9999", ["max_length is 9999", "at most 256"]),
        # Rewards.
        (short("prompts.jsonl", ""), ["no reward is given", "--reward sentiment"]),
        (short("prompts.jsonl", "sentimant"), ["reward 'sentimant' is unknown", "did you mean `sentiment`?"]),
        (short("prompts.jsonl", "no_such_module:f"), ["reward module 'no_such_module' cannot be found"]),
        (short("prompts.jsonl", "no_such.py:f"), ["reward file 'no_such.py' does not exist"]),
        (short("prompts.jsonl", "rewards:leters"), ["rewards has no function 'leters'; it has letters,"]),
        (short("prompts.jsonl", "broken_import:f"), ["importing broken_import raised ModuleNotFoundError"]),
        (short("prompts.jsonl", "model:tiny"), ["model 'tiny' has no reward head"]),
        (short("prompts.jsonl", "rewards.py:boom"),
         ["rewards.py:boom raised KeyError", "at prompts.jsonl:", "completion: "]),
        (short("prompts.jsonl", "rewards.py:few"), ["rewards.py:few gave 1 rewards for 4 completions"]),
        (short("prompts.jsonl", "rewards.py:words"), ["rewards.py:words gave 'good'; expected a number"]),
        (f"{short('prompts.jsonl', 'rewards.py:nothing')} --n 4", ["no usable reward for any of 8"]),
        (f"{short('pairs.jsonl', 'no_such:f', 'dpo')} --eval-data pairs.jsonl", ["'no_such' cannot be"]),
        # Where the run goes.
        (f"{short('prompts.jsonl')} --output foreign", ["'foreign' exists but holds no run"]),
        (f"{short('prompts.jsonl')} --output no_model --overwrite", ["'no_model' exists but holds no run"]),
        (f"{short('prompts.jsonl')} --output prompts.jsonl/run", ["cannot be written: Not a directory"]),
        (f"{short('prompts.jsonl')} --output /proc/run", ["'/proc/run' cannot be written"]),
        (f"{short('prompts.jsonl')} --report-to mlflow", ["report_to 'mlflow' is unknown", "tensorboard"]),
        # Talking to runs and listing them.
        ("chat none", ["'none' does not exist; expected the directory of a run"]),
        ("chat prompts.jsonl", ["'prompts.jsonl' is a file; expected the directory of a run"]),
        ("chat foreign", ["'foreign' is not a run", "see `palate runs`"]),
        ("chat tiny", ["'tiny' is not a run"]),
        ("chat broken_model", ["'broken_model/config.json' cannot be read"]),
        ("chat begun", ["the run 'begun' has no finished checkpoint yet; wait until it saves one"]),
        ("chat begun --step -1", ["--step is -1, expected a whole number of at least 0"]),
        ("chat begun --only both", ["--only is 'both', expected one of checkpoint, base"]),
        ("chat begun --only base --device warp", ["of the run 'begun'", "device 'warp' is unknown"]),
        ("chat begun/checkpoints/step-1", ["is a checkpoint; give the run's directory, 'begun'"]),
        ("chat foreign_step", ["directory 'foreign_step/checkpoints/step-1' holds no model"]),
        ("chat lost", ["base model of the run 'lost' cannot be loaded: model './gone' does not exist"]),
        ("chat lost --only base", ["base model of the run 'lost' cannot be loaded"]),
        ("chat odd", ["'odd/config.json' cannot be used: dtype is 'float8'"]),
        ("runs none", ["'none' does not exist; expected a directory with runs in it"]),
        ("runs prompts.jsonl", ["'prompts.jsonl' is a file; expected a directory with runs in it"]),
        ("report foreign", ["'foreign' is not a run"]),
        # Sampling.
        (f"sample {TINY}", ["no prompts are given; give --prompt TEXT or --data FILE"]),
        (f"sample {TINY} --prompt a --data prompts.jsonl", ["--prompt and --data are both given"]),
        (f"sample {TINY} --prompt a --max-new-tokens 300", ["no room for 300 new", "it begins 'a'"]),
        (f"sample {TINY} --prompt a --max-new-tokens 2 --output a.csv", ["a.csv has the suffix '.csv'"]),
        (
            f"sample {TINY} --prompt a --max-new-tokens 2 --output no/a.jsonl",
            ["the folder no does not exist"],
        ),
        (f"sample {TINY} --prompt a --temperature hot", ["--temperature is 'hot', expected a number"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str, parts: list[str]
) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    err = without_account(err)
    assert err.startswith("palate: ")
    assert err.count("\n") == 1  # and hence no traceback
    assert err.removesuffix("\n").isprintable()  # also where it quotes what a model or a reward has said
    assert all(part in err for part in parts), err
    assert out == ""
    left = {path.name for path in folder.glob("runs/*/*")}
    assert left <= {"config.json", "metrics.jsonl", "status.json", "journal.db", ".lock"}  # no checkpoint
    assert all(path.read_text() == "" for path in folder.glob("runs/*/metrics.jsonl"))


def without_account(err: str) -> str:
    """What stderr has besides the two lines on each data set, with which a run starts."""
    return re.sub(
        r"^\w+\.jsonl( \(held-out\))?: (\d+ rows, all of them used|tokens per row: .*)\n",
        "",
        err,
        flags=re.MULTILINE,
    )


def test_a_mistake_can_be_mended_and_the_command_given_again(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A refused run leaves no directory, and one that failed later does not stand in the way of the next.
    assert main(short("promts.jsonl").split()) == 2
    assert not (folder / "runs").exists()
    assert main(short("prompts.jsonl", "rewards.py:boom").split()) == 2
    assert (folder / "runs" / "oaif" / "journal.db").is_file()
    assert main([*short("prompts.jsonl").split(), "--overwrite"]) == 0


def test_a_run_that_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = short("pairs.jsonl", "", "dpo").split()
    assert main(line) == 0
    before = (folder / "runs" / "dpo" / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert main([*line, "--seed", "1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (
        "'runs/dpo' already holds a run: seed is 0 there and 1 here; use the original value to resume" in err
    )
    assert main(line) == 0  # the same command goes on, and there is nothing left to do
    assert (folder / "runs" / "dpo" / "metrics.jsonl").read_text() == before
    assert main([*line, "--seed", "1", "--overwrite"]) == 0


def test_the_real_process_ends_as_the_function_does(folder: Path) -> None:
    # Here no warning of a library may add a line, nor a thread of one keep it from ending.
    command = [sys.executable, "-m", "palate", *short("prompts.jsonl", "rewards.py:boom").split()]
    environment = {**os.environ, "PYTHONPATH": str(Path(str(palate.__file__)).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 3
    last = without_account(done.stderr)
    assert last.startswith("palate: reward function rewards.py:boom raised KeyError")
    assert last.count("\n") == 1


# ---- What works ------------------------------------------------------------------------------------


def test_run_oaif(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"run oaif --config run.yaml {TINY} --eval-data prompts.jsonl --output out/first --beta 0.2"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    for name in ("prompts.jsonl", "prompts.jsonl (held-out)"):
        assert err.count(f"{name}: 2 rows, all of them used\n") == 1
    warning, *progress = without_account(err).splitlines()
    assert warning.startswith("step 1: 100% of the completions were truncated at max_new_tokens")
    assert len(progress) == 2
    assert progress[0].startswith("step 1/2  reward ")
    assert progress[1].startswith("step 2/2  reward ")
    for shown in ("held-out prompts (2)", "mean reward", "win rate against before", "KL from before"):
        assert shown in out
    answers = [line.split(" (")[0] for line in out.splitlines() if line.startswith(("before (", "after ("))]
    assert answers == ["before", "after"] * 2  # to both prompts
    assert "out/first/checkpoints/step-2" in out
    assert "\nreport      out/first/report.html\n" in out
    assert (folder / "out/first/report.html").is_file()
    description = json.loads((folder / "out/first/config.json").read_text())
    assert description["data"].keys() == {"prompts.jsonl", "prompts.jsonl (held-out)"}
    config = description["config"]
    assert (config["beta"], config["steps"]) == (0.2, 2)  # the flag's and the file's
    assert (folder / "out/first/checkpoints/step-2/adapter_model.safetensors").is_file()


def test_run_dpo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{short('pairs.jsonl', '', 'dpo')} --eval-data pairs.jsonl --no-lora"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert without_account(err).count("\n") == 2
    assert "held-out pairs (4)" in out
    assert "accuracy" in out
    assert "\ncheckpoint  runs/dpo/checkpoints/step-2\n" in out
    AutoModelForCausalLM.from_pretrained("runs/dpo/checkpoints/step-2")


def test_a_path_is_not_broken_where_the_output_is_no_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a" * 90
    assert main(f"{short('pairs.jsonl', '', 'dpo')} --output {name}".split()) == 0
    assert f"{name}/checkpoints/step-2\n" in capsys.readouterr().out


@pytest.fixture
def sampled(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def sample(flags: str) -> str:
        assert main(f"sample {TINY} --max-new-tokens 5 {flags}".split()) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return sample


def test_sample_as_json(sampled: Callable[[str], str]) -> None:
    lines = sampled("--data prompts.jsonl --n 2 --json")
    assert lines == sampled("--data prompts.jsonl --n 2 --json-lines")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert [row["prompt"] for row in rows] == ["one", "one", "two", "two"]
    for row in rows:
        assert row.keys() == {"prompt", "completion", "finish", "tokens", "logp"}
        assert 1 <= row["tokens"] <= 5
        assert row["logp"] < 0
        assert row["finish"] in ("eos", "length")


def test_sample_the_same_and_other(sampled: Callable[[str], str]) -> None:
    one, same, other = (sampled(f"--prompt hi --json --seed {seed}") for seed in (1, 1, 2))
    assert one == same != other


def test_sample_in_chat_form(sampled: Callable[[str], str]) -> None:
    (line,) = sampled("--data chat.jsonl --json").splitlines()
    row = json.loads(line)
    assert row["prompt"] == [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert [turn["role"] for turn in row["completion"]] == ["assistant"]
    assert sampled("--data chat.jsonl").startswith("U\n")  # for people: what was asked


def test_sample_for_people_leaves_text_as_it_is(sampled: Callable[[str], str]) -> None:
    text = "word" * 30  # longer than a line
    assert sampled(f"--prompt {text}").startswith(f"{text}\n")


def test_sample_to_a_file(sampled: Callable[[str], str], folder: Path) -> None:
    expected = [json.loads(line) for line in sampled("--data prompts.jsonl --json").splitlines()]
    assert sampled("--data prompts.jsonl --output rows.jsonl") == ""
    assert [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()] == expected
    sampled("--data prompts.jsonl --output rows.parquet")
    assert pq.read_table(folder / "rows.parquet").to_pylist() == expected


def test_what_was_trained_can_be_sampled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(short("prompts.jsonl").split()) == 0
    capsys.readouterr()
    checkpoint = folder / "runs/oaif/checkpoints/step-2"
    line = f"sample --model {checkpoint} --device cpu --prompt hi --max-new-tokens 3 --json"
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "hi"


def test_what_was_trained_can_be_talked_to_listed_and_reported(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*short("prompts.jsonl").split(), "--eval-data", "prompts.jsonl"]) == 0
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/quit\n"))
    assert main(["chat", "runs/oaif", "--max-new-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("you  hi\nbase  ")
    assert "\ncheckpoint  " in out
    assert err == ""
    assert main(["runs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"], row["step"], row["steps"]) == ("runs/oaif", "finished", 2, 2)
    assert {"reward_before", "reward_after", "win_rate"} <= row["figures"].keys()
    assert main(["report", "runs/oaif", "--output", "page.html"]) == 0
    assert capsys.readouterr() == ("page.html\n", "")
    assert (folder / "page.html").is_file()
