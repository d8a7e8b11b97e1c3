from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import Field

import palate
from palate.cli import main
from palate.cli.app import build_app
from palate.cli.command import Command, Group
from palate.cli.commands import COMMANDS
from palate.cli.commands.annotate import COMMAND as ANNOTATE
from palate.cli.commands.chat import COMMAND as CHAT
from palate.cli.commands.compare import COMMAND as COMPARE
from palate.cli.commands.evaluate import COMMAND as EVALUATE
from palate.cli.commands.inspect import COMMAND as INSPECT
from palate.cli.commands.make import COMMAND as MAKE
from palate.cli.commands.methods import COMMAND as LIST
from palate.cli.commands.plan import COMMAND as PLAN
from palate.cli.commands.pool import COMMAND as POOL
from palate.cli.commands.report import COMMAND as REPORT
from palate.cli.commands.run import COMMAND as RUN
from palate.cli.commands.runs import COMMAND as RUNS
from palate.config import BatchConfig, Config, MethodConfig, ModelConfig
from palate.errors import DataError


class Toy(BatchConfig, MethodConfig):
    """A toy method."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull."""


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


class Fake:
    """The program's commands, none of which does its work: calls are noted, and `outcome` gives their result.

    `run`, `chat` and `sample` have options of their own; the others have those of the real ones.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.outcome: Callable[[], int | None] = lambda: None
        methods = {name: self.method(name, help) for name, help in METHODS.items()}
        self.commands: dict[str, Command | Group] = {
            "run": replace(RUN, members=lambda: methods),
            "sample": Command("sample", "Sample.", self.configured("sample"), config=SampleConfig),
            "evaluate": replace(EVALUATE, members=dict),
            "inspect": replace(INSPECT, call=self.configured("inspect")),
            "annotate": replace(ANNOTATE, call=self.configured("annotate")),
            "pool": replace(POOL, call=self.configured("pool")),
            "compare": replace(COMPARE, call=self.configured("compare")),
            "chat": replace(CHAT, call=self.configured("chat"), config=ChatConfig),
            "make": MAKE,
            "plan": replace(PLAN, members=dict),
            **{command.name: replace(command, call=self.called(command)) for command in (RUNS, REPORT, LIST)},
        }

    def method(self, name: str, help: str) -> Command:
        return Command(name, help, self.configured(name), config=Toy)

    def configured(self, name: str) -> Callable[[Any], int | None]:
        def call(config: Any) -> int | None:
            self.calls.append((name, config))
            return self.outcome()

        return call

    def called(self, command: Command) -> Callable[..., int | None]:
        @wraps(command.call)
        def call(*values: Any, **options: Any) -> int | None:
            self.calls.append((command.name, values, options))
            return self.outcome()

        return call

    def __call__(self, line: str) -> int:
        return main(line.split(), commands=self.commands)


METHODS = {
    "dpo": "Direct preference optimisation.",
    "oaif": "Online AI feedback.",
    "reward-model": "A reward model.",
}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("COLUMNS", "100")
    return Fake()


@pytest.fixture
def complaint(fake: Fake, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    def run(line: str) -> str:
        assert fake(line) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("palate: ")
        assert err.count("\n") == 1
        assert fake.calls == []
        return err.removeprefix("palate: ").removesuffix("\n")

    return run


# What works


def test_run_hands_the_config_to_the_action(fake: Fake) -> None:
    assert fake("run reward-model --data x --beta 0.3 --no-lora") == 0
    assert fake.calls == [("reward-model", Toy(data="x", beta=0.3, lora=False))]


def test_sample_hands_the_config_to_the_action(fake: Fake) -> None:
    assert fake("sample --prompt hi") == 0
    assert fake.calls == [("sample", SampleConfig(prompt="hi"))]


def test_chat_hands_the_config_to_the_action(fake: Fake) -> None:
    assert fake("chat runs/a --seed 3") == 0
    assert fake.calls == [("chat", ChatConfig(run=Path("runs/a"), seed=3))]


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("runs", ("runs", (), {})),
        ("runs exp --json", ("runs", (Path("exp"),), {"json": True})),
        ("report a", ("report", (Path("a"),), {})),
        (
            "report a b --output c.html --open",
            ("report", (Path("a"), Path("b")), {"output": Path("c.html"), "show": True}),
        ),
        ("report --output c.html a", ("report", (Path("a"),), {"output": Path("c.html")})),
        ("methods", ("methods", (), {})),
        ("methods --json", ("methods", (), {"json": True})),
    ],
)
def test_listings(fake: Fake, line: str, call: Any) -> None:
    assert fake(line) == 0
    assert fake.calls == [call]


def test_the_actions_exit_code_is_the_programs(fake: Fake) -> None:
    fake.outcome = lambda: 3
    assert fake("sample") == 3


@pytest.mark.parametrize("line", ["--version", "run --version"])
def test_version(fake: Fake, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert fake(line) == 0
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
def test_help_of_run_lists_the_methods(fake: Fake, capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert fake(line) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate run METHOD [OPTIONS]\n")
    assert "╭─ Methods ─" in out
    assert "│ reward-model  A reward model. " in out


def test_help_of_a_method(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake("run dpo --help") == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate run dpo [OPTIONS]\n\nDirect preference optimisation.\n")
    assert "--beta FLOAT" in out.split("╭─ Model ─")[0]
    assert fake.calls == []


def test_help_of_sample(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake("sample --help") == 0
    assert "--prompt TEXT" in capsys.readouterr().out.split("╭─ Model ─")[0]


def test_help_of_chat(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake("chat --help") == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate chat RUN [OPTIONS]\n")
    assert "│ RUN  Whose models. " in out
    assert "--run" not in out


@pytest.mark.parametrize(("command", "usage"), [("runs", "[DIRECTORY]"), ("report", "RUN...")])
def test_help_of_listings(fake: Fake, capsys: pytest.CaptureFixture[str], command: str, usage: str) -> None:
    assert fake(f"{command} --help") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"Usage: palate {command} {usage} [OPTIONS]\n")
    assert f"│ {usage.strip('[].')} " in out


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("run dpo --data x", {"run"}),
        ("sample", {"sample"}),
        ("--help", set(COMMANDS)),
        ("smaple", set(COMMANDS)),
    ],
)
def test_only_what_is_asked_for_is_built(fake: Fake, line: str, names: set[str]) -> None:
    app = build_app(line.split(), fake.commands)
    assert {name for name in app if not name.startswith("-")} == names
    if names == {"run"}:
        assert {name for name in app["run"] if not name.startswith("-")} == {"dpo"}


def test_every_file_is_a_command() -> None:
    names = [
        "annotate",
        "chat",
        "compare",
        "evaluate",
        "inspect",
        "make",
        "methods",
        "plan",
        "pool",
        "report",
        "run",
        "runs",
        "sample",
    ]
    assert list(COMMANDS) == names
    assert all(COMMANDS[name].name == name for name in COMMANDS)


# Mistakes


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run oaiff", "unknown method 'oaiff'; did you mean 'oaif'? `palate methods` lists the methods"),
        (
            "run OAIF --data x",
            "unknown method 'OAIF'; did you mean 'oaif'? `palate methods` lists the methods",
        ),
        ("run qqq --help", "unknown method 'qqq'; `palate methods` lists the methods"),
        (
            "run --beta 1 dpo",
            "expected a method right after `palate run`, got --beta; `palate methods` lists the methods",
        ),
        ("sampel", "unknown command 'sampel'; did you mean 'sample'? `palate --help` lists the commands"),
        ("rnus", "unknown command 'rnus'; did you mean 'runs'? `palate --help` lists the commands"),
        ("chta runs/a", "unknown command 'chta'; did you mean 'chat'? `palate --help` lists the commands"),
        ("reports a", "unknown command 'reports'; did you mean 'report'? `palate --help` lists the commands"),
        (
            "dpo --data x",
            "unknown command 'dpo'; did you mean `palate run dpo`? `palate --help` lists the commands",
        ),
        ("qqq", "unknown command 'qqq'; `palate --help` lists the commands"),
        (
            "--config a.yaml run dpo",
            "expected a command right after `palate`, got --config; `palate --help` lists the commands",
        ),
        (
            "run dpo --betta 1",
            "unknown flag --betta; did you mean --beta? `palate run dpo --help` lists the flags",
        ),
        ("run dpo --qqq=1", "unknown flag --qqq; `palate run dpo --help` lists the flags"),
        ("run dpo -b 1", "unknown flag -b; `palate run dpo --help` lists the flags"),
        (
            "run dpo --learning_rate=1e-6",
            "unknown flag --learning_rate; did you mean --lr? `palate run dpo --help` lists the flags",
        ),
        (
            "run oaif --output_dir x",
            "unknown flag --output_dir; did you mean --output? `palate run oaif --help` lists the flags",
        ),
        ("methods --jsn", "unknown flag --jsn; did you mean --json? `palate methods --help` lists the flags"),
        ("chat", "run is missing; write `palate chat RUN`"),
        ("chat --seed 1", "run is missing; write `palate chat RUN`"),
        ("chat --run a", "unknown flag --run; `palate chat --help` lists the flags"),
        ("chat a --sed 1", "unknown flag --sed; did you mean --seed? `palate chat --help` lists the flags"),
        (
            "chat a b",
            "unexpected 'b': a value must follow its flag; `palate chat --help` lists the flags",
        ),
        ("chat a --seed x", "--seed is 'x', expected a whole number"),
        ("report --output", "--output has no value, expected `--output FILE`"),
        (
            "report a --opne",
            "unknown flag --opne; did you mean --open? `palate report --help` lists the flags",
        ),
        ("runs --jsn", "unknown flag --jsn; did you mean --json? `palate runs --help` lists the flags"),
        (
            "runs a b",
            "unexpected 'b': a value must follow its flag; `palate runs --help` lists the flags",
        ),
        ("run dpo --data", "--data has no value, expected `--data TEXT`"),
        ("run dpo --beta --data x", "--beta has no value, expected `--beta FLOAT`"),
        (
            "run dpo --model -x",
            "--model has no value, expected `--model TEXT`; "
            "if the value starts with a dash, write `--model=-x`",
        ),
        (
            "run dpo a.jsonl",
            "unexpected 'a.jsonl': a value must follow its flag, such as `--data a.jsonl`; "
            "`palate run dpo --help` lists the flags",
        ),
        (
            "run dpo --lora false --data x",
            "unexpected 'false': --lora takes no value; write --lora or --no-lora",
        ),
        ("run dpo --lora=maybe", "--lora is 'maybe', expected no value, or true or false"),
        ("run dpo --beta 1 --beta 2", "--beta is given more than once; keep one"),
        ("run dpo --lora --no-lora", "--lora or --no-lora is given more than once; keep one"),
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


def test_an_actions_mistake_is_one_line_however_long(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.outcome = failing(DataError("row 3 has\n  no prompt " + "and so on " * 30))
    assert fake("sample") == 2
    err = capsys.readouterr().err
    assert err.startswith("palate: row 3 has no prompt and so on and so on")
    assert err.count("\n") == 1


def test_on_a_terminal_the_line_is_styled_and_not_wrapped(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    fake.outcome = failing(DataError("[bold]row 3[/bold] " + "and so on " * 30))
    assert fake("sample") == 2
    assert screen.getvalue().startswith("\x1b[1;31mpalate:\x1b[0m [bold]row 3[/bold] and so on")
    assert screen.getvalue().count("\n") == 1


def test_an_interrupt_is_130(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.outcome = failing(KeyboardInterrupt())
    assert fake("sample") == 130
    assert capsys.readouterr().err == "palate: interrupted\n"


@pytest.mark.parametrize("error", [RuntimeError("ours"), ValueError("ours"), BrokenPipeError("a socket's")])
def test_other_errors_go_through(fake: Fake, error: Exception) -> None:
    fake.outcome = failing(error)
    with pytest.raises(type(error)):
        fake("sample")


# The real process

SOURCE = str(Path(palate.__file__ or "").parents[1])
FLOOD = """
import sys
from palate.cli import main
from palate.cli.command import Command
def flood():
    for i in range(100_000): print(i)
sys.exit(main(["flood"], commands={"flood": Command("flood", "Prints a lot.", flood)}))
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


def test_python_m_palate() -> None:
    with python("-m", "palate", "--beta") as process:
        out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert (
        err
        == "palate: expected a command right after `palate`, got --beta; `palate --help` lists the commands\n"
    )


# A group with a default


@pytest.mark.parametrize(
    ("line", "member"),
    [
        ("measure --seed 3", "first"),
        ("measure first --seed 3", "first"),
        ("measure second --seed 3", "second"),
    ],
)
def test_a_flag_right_after_a_group_belongs_to_its_default(fake: Fake, line: str, member: str) -> None:
    members = {name: Command(name, name, fake.configured(name), config=Toy) for name in ("first", "second")}
    fake.commands["measure"] = replace(RUN, name="measure", members=lambda: members, default="first")
    assert fake(f"{line} --data x") == 0
    assert fake.calls == [(member, Toy(data="x", seed=3))]


def test_help_of_a_group_with_a_default_lists_its_members(
    fake: Fake, capsys: pytest.CaptureFixture[str]
) -> None:
    members = {name: Command(name, f"Do {name}.", fake.configured(name)) for name in ("first", "second")}
    fake.commands["measure"] = replace(RUN, name="measure", members=lambda: members, default="first")
    for line in ("measure", "measure --help"):
        assert fake(line) == 0
        assert "Do second." in capsys.readouterr().out
