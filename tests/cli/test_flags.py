from __future__ import annotations

import inspect
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from cyclopts import App
from pydantic import Field
from rich.console import Console

from palate.cli.flags import command, metavar, panels
from palate.config import BatchConfig, Config, MethodConfig, ModelConfig, Names, Sampling
from palate.errors import ConfigError
from palate.settings import load_config


class Toy(BatchConfig, Sampling, MethodConfig):
    """A toy method (its own first line is no title)."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull
    to the reference."""
    loss: Literal["sigmoid", "hinge"] = "sigmoid"
    """Shape of the loss."""
    scales: tuple[float, ...] = (0.5, 1.0)
    """Several numbers."""
    depth: Literal[1, 2] = 1
    """A choice of numbers."""
    clip: int | Literal["auto"] = "auto"
    """A number or a word."""
    quiet: bool | None = None
    """A switch that may be left alone."""
    max_new_tokens: int = Field(32, ge=1)


def parse(*tokens: str, cls: type[Config] = Toy, base: Mapping[str, Any] | None = None) -> Any:
    app = App(name="palate")
    app.command(command(cls, lambda config: config, name="toy", help="A toy.", base=base), name="toy")
    return app(["toy", *tokens], result_action="return_value", exit_on_error=False, print_error=False)


def complaint(*tokens: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*tokens)
    return str(caught.value)


def help_of(cls: type[Config], base: Mapping[str, Any] | None = None, width: int = 110) -> str:
    out = io.StringIO()
    app = App(name="palate", help_format="plaintext", console=Console(file=out, width=width))
    app.command(command(cls, print, name="toy", help="Trains a toy.", base=base), name="toy")
    app(["toy", "--help"], result_action="return_value")
    return out.getvalue()


def panel(text: str, title: str) -> str:
    """The lines of one panel, as one line without its frame."""
    body = text.split(f"╭─ {title} ─")[1].split("╰")[0].split("╮")[1]
    return " ".join(body.replace("│", " ").split())


# Values


def test_nothing_given_is_the_defaults() -> None:
    assert parse("--data", "x") == Toy(data="x")


@pytest.mark.parametrize(
    ("tokens", "field", "value"),
    [
        (["--beta", "0.5"], "beta", 0.5),
        (["--beta=5e-2"], "beta", 0.05),
        (["--lr", "3e-4"], "lr", 3e-4),
        (["--max-length", "128"], "max_length", 128),
        (["--max_length", "128"], "max_length", 128),
        (["--lora"], "lora", True),
        (["--no-lora"], "lora", False),
        (["--quiet"], "quiet", True),
        (["--no-quiet"], "quiet", False),
        (["--loss", "hinge"], "loss", "hinge"),
        (["--depth", "2"], "depth", 2),
        (["--clip", "3"], "clip", 3),
        (["--clip", "auto"], "clip", "auto"),
        (["--output", "runs/a"], "output", Path("runs/a")),
        (["--stop", "a", "--stop", "b"], "stop", ("a", "b")),
        (["--stop", "[1, 2]", "--stop", "{}"], "stop", ("[1, 2]", "{}")),
        (["--stop=-x", "--stop=--"], "stop", ("-x", "--")),
        (["--stop", "none"], "stop", ("none",)),
        (["--scales", "1", "--scales", "2.5"], "scales", (1.0, 2.5)),
        (["--map", "prompt=instruction", "--map=a=b=c"], "map", {"prompt": "instruction", "a": "b=c"}),
        (["--split", "none"], "split", "none"),
    ],
)
def test_flags_become_values(tokens: list[str], field: str, value: Any) -> None:
    assert getattr(parse("--data", "x", *tokens), field) == value


def test_the_file_lies_between_flags_and_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: file\nbeta: 0.1\nlora: false\nseed: 3\nmap: {prompt: a}\n")
    config = parse("--config", str(file), "--seed", "4", base={"beta": 0.7, "steps": 5})
    # A flag at its default's value still counts, and so does the file's: 0.1 is beta's default.
    assert (config.data, config.seed, config.lora, config.beta, config.steps) == ("file", 4, False, 0.1, 5)
    assert parse("--config", str(file), "--lora").lora
    assert parse("--config", str(file), "--map", "chosen=b").map == {"chosen": "b"}


def test_the_command_hands_on_what_run_returns() -> None:
    action: Callable[..., int] = command(Sampling, lambda config: config.top_k, name="to-y", help="A toy.")
    assert (action(top_k="3"), action.__name__, action.__doc__) == (3, "to_y", "A toy.")
    parameters = inspect.signature(action).parameters
    assert list(parameters)[:2] == ["config", "temperature"]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


# Mistakes


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--beta", "-0.1"], "--beta is -0.1, expected a number greater than 0"),
        (["--lr=-1"], "--lr is -1, expected a number greater than 0"),
        (["--lr", "-1e-3"], "--lr is -1e-3, expected a number greater than 0"),
        (["--beta", "abc"], "--beta is 'abc', expected a number greater than 0"),
        (["--seed", "1.5"], "--seed is 1.5, expected a whole number of at least 0"),
        (["--loss", "hing"], "--loss is 'hing', expected one of sigmoid, hinge, did you mean hinge?"),
        (["--depth", "3"], "--depth is 3, expected one of 1, 2"),
        (["--scales", "1", "--scales", "b"], "--scales[1] is 'b', expected a number"),
        (["--map", "prompt"], "--map is 'prompt', expected KEY=VALUE, such as prompt=instruction"),
        (["--map", "=a"], "--map is '=a', expected KEY=VALUE, such as prompt=instruction"),
        (["--map", "a=b", "--map", "a=c"], "--map sets a twice, to b and c; keep one"),
        (
            ["--min-new-tokens", "400"],
            "min_new_tokens is 400, but max_new_tokens is only 32; lower min_new_tokens or raise "
            "max_new_tokens",
        ),
        (
            ["--config", "/no/such.yaml"],
            "config file /no/such.yaml does not exist, expected the path of a YAML file",
        ),
    ],
)
def test_a_bad_value_is_one_sentence_that_names_the_flag(tokens: list[str], message: str) -> None:
    assert complaint("--data", "x", *tokens) == message


def test_what_is_required_may_come_from_anywhere() -> None:
    assert complaint() == "data is missing, give --data or the key `data` in a --config file"
    assert parse(base={"data": "x"}).data == "x"


# Help


def test_panels_in_the_order_of_the_parts_the_methods_own_first() -> None:
    titles = list(panels(Toy))
    assert titles == ["Method", "Sampling", "Model", "Optimisation", "Data", "Run"]
    assert sorted(name for names in panels(Toy).values() for name in names) == sorted(Toy.model_fields)
    assert panels(Toy)["Method"][:2] == ["beta", "loss"]
    assert panels(Toy)["Method"][-2:] == ["batch_size", "steps"]
    assert "max_new_tokens" in panels(Toy)["Sampling"]  # where it was first declared


def test_a_class_that_is_no_method_has_options() -> None:
    class Draw(ModelConfig, Sampling):
        """Not a title"""

        prompt: str

    assert list(panels(Draw)) == ["Options", "Model", "Sampling"]
    assert list(panels(Sampling)) == ["Options"]


def test_help_has_panels_types_defaults_and_texts() -> None:
    text = help_of(Toy)
    assert text.startswith("Usage: palate toy [OPTIONS]\n\nTrains a toy.\n")
    titles = [line.split()[1] for line in text.splitlines() if line.startswith("╭")]
    assert titles == ["Method", "Sampling", "Model", "Optimisation", "Data", "Run"]
    own = panel(text, "Method")
    for line in (
        "--config FILE YAML file with any of these options by name. Flags override it. Relative paths of",
        "are relative to the file, or to the working directory if only that has them; --output is relative",
        "--beta FLOAT Strength of the pull to the reference. [default: 0.1]",
        "--loss sigmoid|hinge Shape of the loss. [default: sigmoid]",
        "--scales FLOAT Several numbers. Repeatable. [default: 0.5, 1]",
        "--depth 1|2 A choice of numbers. [default: 1]",
        "--clip INT|auto A number or a word. [default: auto]",
        "--quiet --no-quiet A switch that may be left alone. --batch-size INT",
    ):
        assert line in own
    longest = "Maximum number of tokens per completion; longer completions are truncated."
    assert f"--max-new-tokens INT {longest} [default: 32]" in panel(text, "Sampling")
    assert "--stop TEXT Texts that end a completion. Repeatable. --" in panel(text, "Sampling")
    data = panel(text, "Data")
    assert "(prompts that come with Palate). [required]" in data
    assert (
        "--map KEY=VALUE Names of the columns in your data, as OURS=YOURS, such as `prompt=instruction`. "
        "Repeatable. --limit" in data
    )
    model = panel(text, "Model")
    assert "--lora --no-lora Train a LoRA adapter" in model
    assert "[default: --lora]" in model
    assert "[default: --no-checkpointing]" in model
    assert "--chat-template PATH" in model
    assert "--empty" not in text


def test_help_shows_the_base_as_default() -> None:
    text = help_of(Toy, base={"beta": 0.25, "data": "everyday", "map": {"prompt": "q"}, "reward": ()})
    assert "to the reference. [default: 0.25]" in panel(text, "Method")
    assert "[default: everyday]" in panel(text, "Data")
    assert "[default: prompt=q]" in panel(text, "Data")
    assert "[required]" not in text


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        (int | None, "INT"),
        (float, "FLOAT"),
        (str, "TEXT"),
        (Names, "TEXT"),
        (Names | None, "TEXT"),
        (Path | None, "PATH"),
        (Literal["a", "b"] | None, "a|b"),
        (Mapping[str, str], "KEY=VALUE"),
    ],
)
def test_metavars(hint: Any, shown: str) -> None:
    assert metavar(hint) == shown


class Stated(Config):
    """Options"""

    beta: float = 0.1
    """Strength. Default: 0.1 for dpo, 1 for ipo."""
    json_lines: bool = False
    """Print JSON."""

    flags: ClassVar[Mapping[str, str]] = {"json_lines": "--json"}


def test_a_default_that_the_text_states_is_not_repeated() -> None:
    text = panel(help_of(Stated), "Options")
    assert "--beta FLOAT Strength. Default: 0.1 for dpo, 1 for ipo. --json Print JSON." in text
    assert "[default: 0.2]" in panel(help_of(Stated, base={"beta": 0.2}), "Options")


@pytest.mark.parametrize(
    ("tokens", "value"),
    [([], False), (["--json"], True), (["--json-lines"], True), (["--no-json-lines"], False)],
)
def test_a_renamed_switch_keeps_the_name_of_its_field(tokens: list[str], value: bool) -> None:
    app = App(name="palate")
    app.command(command(Stated, lambda config: config.json_lines, name="toy", help="A toy."), name="toy")
    assert (
        app(["toy", *tokens], result_action="return_value", exit_on_error=False, print_error=False) is value
    )
    assert "json-lines" not in help_of(Stated)


class Narrow(Toy):
    unoffered: ClassVar = frozenset({"lora", "depth", "data"})


def test_a_field_that_is_not_offered_has_no_flag_and_no_key(tmp_path: Path) -> None:
    assert not {"lora", "depth", "data"} & {name for names in panels(Narrow).values() for name in names}
    text = help_of(Narrow, {"data": "x"})
    assert "--lora-rank" in text
    assert "--lora " not in text
    file = tmp_path / "a.yaml"
    file.write_text("lora: true\n")
    with pytest.raises(ConfigError, match=r"unknown key `lora` \(line 1 of .*\), did you mean `lr`"):
        load_config(Narrow, file=file, flags={}, base={"data": "x"})


def test_the_first_word_is_a_field() -> None:
    app = App(name="palate")
    action = command(Narrow, lambda config: config, name="toy", help="A toy.", first="data")
    app.command(action, name="toy")
    options = {"result_action": "return_value", "exit_on_error": False, "print_error": False}
    config = app(["toy", "a.jsonl", "--beta", "0.3"], **options)
    assert (config.data, config.beta) == ("a.jsonl", 0.3)
    assert app(["toy", "--beta", "0.3", "b.jsonl"], **options).data == "b.jsonl"
    with pytest.raises(ConfigError, match="data is missing; write `palate toy DATA`"):
        app(["toy"], **options)
