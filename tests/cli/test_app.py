from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

import palate
from palate.cli import main
from palate.cli.app import build_app
from palate.config import BatchConfig, Config, MethodConfig, ModelConfig
from palate.errors import DataError


class Toy(BatchConfig, MethodConfig):
    """A toy method."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull."""


@dataclass
class FakeMethod:
    name: str
    summary: str
    options: type[Config] = Toy

    def choose(self, values: Mapping[str, Any]) -> type[Config]:
        return self.options


class SampleConfig(ModelConfig):
    """Sample"""

    prompt: str = "hello"
    """What to complete."""


class ChatConfig(Config):
    """Chat"""

    unoffered: ClassVar = frozenset({"run"})
    run: Path
    """Whose models."""
    seed: int = 0
    """Of the draws."""


@dataclass
class FakeActions:
    calls: list[Any] = field(default_factory=list)
    outcome: Callable[[], int | None] = lambda: None
    SampleConfig: type[Config] = SampleConfig
    ChatConfig: type[Config] = ChatConfig

    def run(self, method: str, config: Any) -> int | None:
        self.calls.append((method, config))
        return self.outcome()

    def sample(self, config: Any) -> int | None:
        self.calls.append(("sample", config))
        return self.outcome()

    def chat(self, config: Any) -> int | None:
        self.calls.append(("chat", config))
        return self.outcome()

    def runs(self, directory: Path | None, *, json: bool) -> int | None:
        self.calls.append(("runs", directory, json))
        return self.outcome()

    def report(self, runs: Sequence[Path], *, output: Path | None, show: bool) -> int | None:
        self.calls.append(("report", [*runs], output, show))
        return self.outcome()

    def methods(self, json: bool) -> int | None:
        self.calls.append(("methods", json))
        print('["dpo"]' if json else "a table")
        return self.outcome()


METHODS = {
    "dpo": FakeMethod("dpo", "Direct preference optimisation."),
    "oaif": FakeMethod("oaif", "Online AI feedback."),
    "reward-model": FakeMethod("reward-model", "A reward model."),
}


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> FakeActions:
    monkeypatch.setenv("COLUMNS", "100")
    return FakeActions()


@pytest.fixture
def complaint(actions: FakeActions, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def run(line: str) -> str:
        assert main(line.split(), methods=METHODS, actions=actions) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("palate: ")
        assert err.count("\n") == 1
        assert actions.calls == []
        return err.removeprefix("palate: ").removesuffix("\n")

    return run


# What works


def test_run_hands_the_config_to_the_action(actions: FakeActions) -> None:
    line = ["run", "reward-model", "--data", "x", "--beta", "0.3", "--no-lora"]
    assert main(line, methods=METHODS, actions=actions) == 0
    assert actions.calls == [("reward-model", Toy(data="x", beta=0.3, lora=False))]


def test_sample_hands_the_config_to_the_action(actions: FakeActions) -> None:
    assert main(["sample", "--prompt", "hi"], methods=METHODS, actions=actions) == 0
    assert actions.calls == [("sample", SampleConfig(prompt="hi"))]


def test_chat_hands_the_config_to_the_action(actions: FakeActions) -> None:
    assert main(["chat", "runs/a", "--seed", "3"], methods=METHODS, actions=actions) == 0
    assert actions.calls == [("chat", ChatConfig(run=Path("runs/a"), seed=3))]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("runs", ("runs", None, False)),
        ("runs exp --json", ("runs", Path("exp"), True)),
        ("report a", ("report", [Path("a")], None, False)),
        ("report a b --output c.html --open", ("report", [Path("a"), Path("b")], Path("c.html"), True)),
        ("report --output c.html a", ("report", [Path("a")], Path("c.html"), False)),
    ],
)
def test_listings(actions: FakeActions, line: str, call: Any) -> None:
    assert main(line.split(), methods=METHODS, actions=actions) == 0
    assert actions.calls == [call]


def test_the_actions_exit_code_is_the_programs(actions: FakeActions) -> None:
    actions.outcome = lambda: 3
    assert main(["sample"], methods=METHODS, actions=actions) == 3


@pytest.mark.parametrize(("flags", "as_json"), [([], False), (["--json"], True)])
def test_methods(
    actions: FakeActions, capsys: pytest.CaptureFixture[str], flags: list[str], as_json: bool
) -> None:
    assert main(["methods", *flags], methods=METHODS, actions=actions) == 0
    assert actions.calls == [("methods", as_json)]
    assert not as_json or json.loads(capsys.readouterr().out) == ["dpo"]


@pytest.mark.parametrize("line", ["--version", "run --version"])
def test_version(actions: FakeActions, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert main(line.split(), methods=METHODS, actions=actions) == 0
    assert capsys.readouterr().out.startswith("palate ")


@pytest.mark.parametrize("line", ["", "--help", "-h"])
def test_help_of_the_program(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert main(line.split()) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate COMMAND\n")
    names = ("run", "chat", "sample", "runs", "report", "methods")
    positions = [out.index(f"│ {name} ") for name in names]
    assert positions == sorted(positions)


@pytest.mark.parametrize("line", ["run", "run --help", "--help run"])
def test_help_of_run_lists_the_methods(
    actions: FakeActions, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert main(line.split(), methods=METHODS, actions=actions) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate run METHOD [OPTIONS]\n")
    assert "╭─ Methods ─" in out
    assert "│ reward-model  A reward model. " in out


def test_help_of_a_method(actions: FakeActions, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "dpo", "--help"], methods=METHODS, actions=actions) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate run dpo [OPTIONS]\n\nDirect preference optimisation.\n")
    assert "--beta FLOAT" in out.split("╭─ Model ─")[0]
    assert actions.calls == []


def test_help_of_sample(actions: FakeActions, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"], methods=METHODS, actions=actions) == 0
    assert "--prompt TEXT" in capsys.readouterr().out.split("╭─ Model ─")[0]


def test_help_of_chat(actions: FakeActions, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--help"], methods=METHODS, actions=actions) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate chat RUN [OPTIONS]\n")
    assert "│ RUN  Whose models. " in out
    assert "--run" not in out


@pytest.mark.parametrize(("command", "usage"), [("runs", "[DIRECTORY]"), ("report", "RUN...")])
def test_help_of_listings(
    actions: FakeActions, capsys: pytest.CaptureFixture[str], command: str, usage: str
) -> None:
    assert main([command, "--help"], methods=METHODS, actions=actions) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: palate {command} {usage} [OPTIONS]\n")
    assert f"│ {usage.strip('[].')} " in out


def test_only_the_command_asked_for_has_flags(actions: FakeActions) -> None:
    assert "dpo" in build_app("run", methods=METHODS, actions=actions)["run"]
    assert "dpo" not in build_app("sample", methods=METHODS, actions=actions)["run"]


# Mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run oaiff", "unknown method 'oaiff'; did you mean 'oaif'? `palate methods` lists them"),
        ("run OAIF --data x", "unknown method 'OAIF'; did you mean 'oaif'? `palate methods` lists them"),
        ("run qqq --help", "unknown method 'qqq'; `palate methods` lists them"),
        (
            "run --beta 1 dpo",
            "expected a method right after `palate run`, got --beta; `palate methods` lists them",
        ),
        ("sampel", "unknown command 'sampel'; did you mean 'sample'? `palate --help` lists them"),
        ("rnus", "unknown command 'rnus'; did you mean 'runs'? `palate --help` lists them"),
        ("chta runs/a", "unknown command 'chta'; did you mean 'chat'? `palate --help` lists them"),
        ("reports a", "unknown command 'reports'; did you mean 'report'? `palate --help` lists them"),
        ("dpo --data x", "unknown command 'dpo'; did you mean `palate run dpo`? `palate --help` lists them"),
        ("qqq", "unknown command 'qqq'; `palate --help` lists them"),
        (
            "--config a.yaml run dpo",
            "expected a command right after `palate`, got --config; `palate --help` lists them",
        ),
        (
            "run dpo --betta 1",
            "unknown flag --betta; did you mean --beta? `palate run dpo --help` lists them",
        ),
        ("run dpo --qqq=1", "unknown flag --qqq; `palate run dpo --help` lists them"),
        ("run dpo -b 1", "unknown flag -b; `palate run dpo --help` lists them"),
        ("methods --jsn", "unknown flag --jsn; did you mean --json? `palate methods --help` lists them"),
        ("chat", "no run is given, write `palate chat RUN`"),
        ("chat --seed 1", "no run is given, write `palate chat RUN`"),
        ("chat --run a", "unknown flag --run; `palate chat --help` lists them"),
        ("chat a --sed 1", "unknown flag --sed; did you mean --seed? `palate chat --help` lists them"),
        (
            "chat a b",
            "unexpected 'b': a value follows its flag, and `palate chat --help` lists the flags",
        ),
        ("chat a --seed x", "--seed is 'x', expected a whole number"),
        ("report", "no run is given, write `palate report RUN`, as `palate report runs/oaif`"),
        ("report --output", "--output has no value, expected `--output FILE`"),
        ("report a --opne", "unknown flag --opne; did you mean --open? `palate report --help` lists them"),
        ("runs --jsn", "unknown flag --jsn; did you mean --json? `palate runs --help` lists them"),
        (
            "runs a b",
            "unexpected 'b': a value follows its flag, and `palate runs --help` lists the flags",
        ),
        ("run dpo --data", "--data has no value, expected `--data TEXT`"),
        ("run dpo --beta --data x", "--beta has no value, expected `--beta FLOAT`"),
        (
            "run dpo --model -x",
            "--model has no value, expected `--model TEXT`; "
            "a value that starts with a dash is joined, as `--model=-x`",
        ),
        (
            "run dpo a.jsonl",
            "unexpected 'a.jsonl': a value follows its flag, and `palate run dpo --help` lists the flags",
        ),
        (
            "run dpo --lora false --data x",
            "unexpected 'false': --lora takes no value, write --lora or --no-lora",
        ),
        ("run dpo --lora=maybe", "--lora is 'maybe', expected no value, or true or false"),
        ("run dpo --beta 1 --beta 2", "--beta is given more than once, keep one"),
        ("run dpo --lora --no-lora", "--lora or --no-lora is given more than once, keep one"),
        ("run dpo --data x --beta -0.1", "--beta is -0.1, expected a number greater than 0"),
        ("run dpo", "data is missing, give --data or the key `data` in a --config file"),
        ("sample --prompt", "--prompt has no value, expected `--prompt TEXT`"),
    ],
)
def test_a_mistake_is_one_plain_line(complaint: Callable[[str], str], line: str, message: str) -> None:
    assert complaint(line) == message


def test_a_mistake_in_the_file(complaint: Callable[[str], str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: x\nbetta: 1\n")
    assert (
        complaint(f"run dpo --config {file}")
        == f"unknown key `betta` (line 2 of {file}), did you mean `beta`?"
    )


def failing(error: BaseException) -> Callable[[], int | None]:
    def fail() -> int | None:
        raise error

    return fail


def test_an_actions_mistake_is_one_line_however_long(
    actions: FakeActions, capsys: pytest.CaptureFixture[str]
) -> None:
    actions.outcome = failing(DataError("row 3 has\n  no prompt " + "and so on " * 30))
    assert main(["sample"], methods=METHODS, actions=actions) == 2
    err = capsys.readouterr().err
    assert err.startswith("palate: row 3 has no prompt and so on and so on")
    assert err.count("\n") == 1


def test_on_a_terminal_the_line_is_styled_and_not_wrapped(
    actions: FakeActions, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    actions.outcome = failing(DataError("[bold]row 3[/bold] " + "and so on " * 30))
    assert main(["sample"], methods=METHODS, actions=actions) == 2
    assert screen.getvalue().startswith("\x1b[1;31mpalate:\x1b[0m [bold]row 3[/bold] and so on")
    assert screen.getvalue().count("\n") == 1


def test_an_interrupt_is_130(actions: FakeActions, capsys: pytest.CaptureFixture[str]) -> None:
    actions.outcome = failing(KeyboardInterrupt())
    assert main(["sample"], methods=METHODS, actions=actions) == 130
    assert capsys.readouterr().err == "palate: interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), BrokenPipeError("a socket's")])
def test_other_errors_go_through(actions: FakeActions, error: Exception) -> None:
    actions.outcome = failing(error)
    with pytest.raises(type(error)):
        main(["sample"], methods=METHODS, actions=actions)


# The real process

SOURCE = str(Path(palate.__file__ or "").parents[1])
FLOOD = """
import sys
from types import SimpleNamespace
from palate.cli import main
def flood(json):
    for i in range(100_000): print(i)
sys.exit(main(["methods"], methods={}, actions=SimpleNamespace(methods=flood)))
"""


def python(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes, **options)


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    with python("-c", FLOOD) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_help_loads_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; from palate.cli import main; code = main([]); "
        "sys.exit(code or sorted({'torch', 'pydantic', 'yaml', 'transformers'} & set(sys.modules)) or 0)"
    )
    with python("-c", code) as process:
        out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "palate COMMAND" in out


def test_python_m_palate() -> None:
    with python("-m", "palate", "--beta") as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == "palate: expected a command right after `palate`, got --beta; `palate --help` lists them\n"
