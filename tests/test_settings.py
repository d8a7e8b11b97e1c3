from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import Field, field_validator, model_validator

from palate.config import Config, Names
from palate.errors import ConfigError
from palate.methods import METHODS
from palate.settings import expected, load_config


class Toy(Config):
    """Toy"""

    data: str
    beta: float = Field(0.1, gt=0)
    lr: float | None = Field(None, gt=0)
    n: int = Field(2, ge=1)
    top_p: float = Field(1.0, gt=0, le=1)
    max_length: int | None = Field(None, ge=2)
    lora: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    template: Path | None = None
    stop: Names = ()
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    map: dict[str, str] = Field(default_factory=dict)
    clip: int | Literal["auto"] = "auto"
    tag: str = Field("ab", min_length=2)
    low: int = 0
    high: int = 9

    @field_validator("tag")
    @classmethod
    def _no_spaces(cls, tag: str) -> str:
        if " " in tag:
            raise ValueError("a tag has\n  no spaces")
        return tag

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high {self.high}")
        return self


@pytest.fixture
def yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("run.yaml")


def load(file: Path, text: str, **flags: Any) -> Toy:
    file.write_text(text, encoding="utf-8")
    return load_config(Toy, file=file, flags=flags)


def complaint(file: Path | None, text: str, **flags: Any) -> str:
    if file is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(Toy, file=file, flags=flags)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What works


def test_flags_over_file_over_base_over_defaults(yaml: Path) -> None:
    yaml.write_text("data: file\nn: 3\nbeta: 0.3\n")
    config = load_config(Toy, file=yaml, flags={"n": "4"}, base={"data": "base", "beta": 0.2, "top_p": 0.5})
    assert (config.data, config.n, config.beta, config.top_p, config.dtype) == ("file", 4, 0.3, 0.5, "auto")


def test_flags_alone() -> None:
    assert load_config(Toy, file=None, flags={"data": "x", "beta": "1e-3"}).beta == 1e-3


def test_a_number_in_scientific_notation_is_a_number(yaml: Path) -> None:
    assert load(yaml, "data: x\nlr: 3e-4\n").lr == 3e-4  # YAML 1.1 has a string here


@pytest.mark.parametrize("key", ["max-length", "max_length"])
def test_dashes_in_keys(yaml: Path, key: str) -> None:
    assert load(yaml, f"data: x\n{key}: 128\n").max_length == 128


def test_one_value_may_stand_for_a_list_and_null_for_nothing(yaml: Path) -> None:
    config = load(yaml, "data: x\nstop: END\nlr: null\nmap: {prompt: instruction}\n")
    assert (config.stop, config.lr, config.map) == (("END",), None, {"prompt": "instruction"})


def test_the_word_none_is_nothing_where_that_is_the_default(yaml: Path) -> None:
    assert load(yaml, "data: x\nlr: None\ntemplate: None\n", max_length="None") == Toy(data="x")
    assert load(yaml, "data: None\n").data == "None"  # a text like any other where one is required
    assert "n is 'None', expected a whole number" in complaint(yaml, "data: x\nn: None\n")


@pytest.mark.parametrize("text", ["", "# nothing\n", "\n"])
def test_an_empty_file_gives_nothing(yaml: Path, text: str) -> None:
    assert load(yaml, text, data="x") == Toy(data="x")


def test_merge_keys_and_byte_order_mark(yaml: Path) -> None:
    assert load(yaml, "\ufeff<<: {beta: 3, n: 5}\ndata: x\nbeta: 2\n").model_dump(include={"beta", "n"}) == {
        "beta": 2,
        "n": 5,
    }


def test_a_list_in_a_flag_replaces_that_of_the_file(yaml: Path) -> None:
    assert load(yaml, "data: x\nstop: [a, b]\n", stop=["c"]).stop == ("c",)


# Wrong values


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("beta: -0.1", "beta is -0.1, expected a number greater than 0 (line 2 of run.yaml)"),
        ("beta: soft", "beta is 'soft', expected a number greater than 0 (line 2 of run.yaml)"),
        ("beta:", "beta is empty, expected a number greater than 0 (line 2 of run.yaml)"),
        ("beta: .inf", "beta is inf, expected a finite number (line 2 of run.yaml)"),
        ("beta: [1]", "beta is [1], expected a number greater than 0 (line 2 of run.yaml)"),
        ("beta: true", "beta is true, expected a number greater than 0 (line 2 of run.yaml)"),
        ("n: 1.5", "n is 1.5, expected a whole number of at least 1 (line 2 of run.yaml)"),
        ("n: yes", "n is true, expected a whole number of at least 1 (line 2 of run.yaml)"),
        ("max-length: 1", "max_length is 1, expected a whole number of at least 2 (line 2 of run.yaml)"),
        ("top_p: 2", "top_p is 2, expected a number greater than 0 and at most 1 (line 2 of run.yaml)"),
        ("lora: maybe", "lora is 'maybe', expected true or false (line 2 of run.yaml)"),
        ("tag: no", "tag is false, expected text (line 2 of run.yaml), put it in quotes"),
        ("tag: 2024-01-01", "tag is 2024-01-01, expected text (line 2 of run.yaml), put it in quotes"),
        ("tag: a", "tag is 'a': string should have at least 2 characters (line 2 of run.yaml)"),
        ("tag: a b", "tag: a tag has no spaces (line 2 of run.yaml)"),
        ("template: 5", "template is 5, expected a path (line 2 of run.yaml), put it in quotes"),
        ("dtype: 16", "dtype is 16, expected one of auto, float32, bfloat16 (line 2 of run.yaml)"),
        ("stop: {a: 1}", "stop is {'a': 1}, expected text or a list of such values (line 2 of run.yaml)"),
        ("stop: [a, 1]", "stop[1] is 1, expected text (line 2 of run.yaml), put it in quotes"),
        ("weights: [1, -2]", "weights[1] is -2, expected a number greater than 0 (line 2 of run.yaml)"),
        (
            "map: prompt",
            "map is 'prompt', expected names with values, such as `prompt: instruction` (line 2 of run.yaml)",
        ),
        ("map: {prompt: 5}", "map.prompt is 5, expected text (line 2 of run.yaml), put it in quotes"),
        ("clip: 1.5", "clip is 1.5, expected a whole number or auto (line 2 of run.yaml)"),
    ],
)
def test_wrong_values_in_a_file(yaml: Path, line: str, message: str) -> None:
    assert complaint(yaml, f"data: x\n{line}\n") == message


def test_a_choice_is_suggested(yaml: Path) -> None:
    message = "dtype is 'flaot32', expected one of auto, float32, bfloat16 (line 1 of run.yaml)"
    assert complaint(yaml, "dtype: flaot32\ndata: x\n") == f"{message}, did you mean float32?"


def test_a_wrong_flag_is_named_as_a_flag(yaml: Path) -> None:
    wrong = "--max-length is 'long', expected a whole number of at least 2"
    assert complaint(yaml, "data: x\nmax_length: 5\n", max_length="long") == wrong
    assert complaint(None, "", data="x", beta="-0.1") == "--beta is -0.1, expected a number greater than 0"


def test_long_values_are_cut() -> None:
    message = complaint(None, "", data="x", beta="b" * 500)
    assert message.endswith("..., expected a number greater than 0")
    assert len(message) < 120


def test_a_missing_field_names_flag_and_key(yaml: Path) -> None:
    assert complaint(yaml, "beta: 1\n") == "data is missing, give --data or the key `data` in run.yaml"
    assert complaint(None, "") == "data is missing, give --data or the key `data` in a --config file"


def test_a_model_validators_text_passes(yaml: Path) -> None:
    assert complaint(yaml, "data: x\nlow: 5\n", high="3") == "low is 5, above high 3"


def test_several_mistakes_three_told(yaml: Path) -> None:
    message = complaint(yaml, "betta: 1\nn: 0\n", data="x", beta="a", top_p="b", dtype="c")
    first, second, third, rest = message.split("; ")
    assert first == "unknown key `betta` (line 1 of run.yaml), did you mean `beta`?"
    assert second == "--beta is 'a', expected a number greater than 0"
    assert third == "n is 0, expected a whole number of at least 1 (line 2 of run.yaml)"
    assert rest == "and 2 more"


# Wrong keys


def test_unknown_keys(yaml: Path) -> None:
    message = complaint(yaml, "data: x\nmax-lenght: 5\nqqq: 1\n")
    first, second = message.split("; ")
    assert first == "unknown key `max-lenght` (line 2 of run.yaml), did you mean `max_length`?"
    assert second == "unknown key `qqq` (line 3 of run.yaml), --help lists the options"


def test_an_unknown_key_is_shown_as_written(yaml: Path) -> None:
    assert "unknown key `yes`" in complaint(yaml, "data: x\nyes: 1\n")  # YAML 1.1 reads it as true


@pytest.mark.parametrize(
    ("text", "place", "key"),
    [
        (
            "data: x\nbeta: 1\nn: 3\nbeta: 2\n",
            "line 4, column 1",
            "the key `beta` appears twice, first on line 2",
        ),
        ("data: x\nmap: {p: a, p: b}\n", "line 2, column 13", "the key `p` appears twice, first on line 2"),
    ],
)
def test_a_key_twice(yaml: Path, text: str, place: str, key: str) -> None:
    assert complaint(yaml, text) == f"config file run.yaml is not valid YAML at {place}: {key}, keep one"


def test_a_key_twice_in_both_spellings(yaml: Path) -> None:
    message = complaint(yaml, "data: x\nmax-length: 3\nmax_length: 4\n")
    assert message == "`max_length` (line 3 of run.yaml) is already given (line 2 of run.yaml), keep one"


# Wrong files


def test_a_missing_file(yaml: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^config file run\.yaml does not exist, expected the path of a YAML file$"
    ):
        load_config(Toy, file=yaml, flags={})


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(Toy, file=tmp_path, flags={})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: x\nbeta: [1, 2\n", "at line 3, column 1: expected ',' or ']', but got '<stream end>'"),
        ("data: a: b\n", "at line 1, column 8: mapping values are not allowed here"),
        ("data: x\n\tbeta: 1\n", "at line 2, column 1: found character '\\t' that cannot start any token"),
        ("data: x\n---\nn: 1\n", "at line 2, column 1: expected a single document in the stream"),
        ("data: !!python/object:os.system x\n", "at line 1, column 7: could not determine a constructor"),
        ("? [a, b]\n: c\n", "at line 1, column 3: found unhashable key"),
        ("data: \x07\n", ": unacceptable character #x0007"),
    ],
)
def test_broken_yaml(yaml: Path, text: str, message: str) -> None:
    told = complaint(yaml, text)
    assert told.startswith("config file run.yaml is not valid YAML")
    assert message in told


@pytest.mark.parametrize(
    ("text", "kind"), [("- a\n- b\n", "a list"), ("hello\n", "just 'hello'"), ("3\n", "just 3")]
)
def test_a_top_level_that_is_no_mapping(yaml: Path, text: str, kind: str) -> None:
    message = f"config file run.yaml contains {kind}, expected lines of `key: value`, such as `beta: 0.1`"
    assert complaint(yaml, text) == message


def test_a_file_that_is_not_text(yaml: Path) -> None:
    yaml.write_bytes(b"data: \xff\n")
    with pytest.raises(ConfigError, match="is not UTF-8 text: byte 6 cannot be read"):
        load_config(Toy, file=yaml, flags={})


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (float | None, "a number"),
        (Annotated[int, Field(ge=1, lt=5)] | None, "a whole number of at least 1 and less than 5"),
        (tuple[int, ...], "a whole number or a list of such values"),
        (Literal["a"], "a"),
        (bytes, "bytes"),
    ],
)
def test_expected_in_words(hint: Any, words: str) -> None:
    assert expected(hint) == words


def test_settings_of_other_trainers_are_named(yaml: Path) -> None:
    text = complaint(yaml, "data: x\nlearning_rate: 1e-6\nnum_generations: 4\n")
    assert "unknown key `learning_rate` (line 2 of run.yaml), did you mean `lr`?" in text
    assert "unknown key `num_generations` (line 3 of run.yaml), did you mean `n`?" in text


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for place in (
        "mine/beside.jsonl",
        "mine/both.jsonl",
        "both.jsonl",
        "here.jsonl",
        "mine/r.py",
        "mine/t.jinja",
    ):
        (tmp_path / place).write_text("")
    file = Path("mine/run.yaml")
    file.write_text(
        "data: beside.jsonl\neval_data: both.jsonl\nchat_template: t.jinja\noutput: beside.jsonl\n"
        "reward: [r.py:f, 0.5*r.py:g, sentiment]\n"
    )
    config = load_config(METHODS["oaif"].config, file=file, flags={})
    assert (config.data, config.eval_data) == ("mine/beside.jsonl", "mine/both.jsonl")
    assert (config.chat_template, config.output) == (Path("mine/t.jinja"), Path("beside.jsonl"))
    assert config.reward == ("mine/r.py:f", "0.5*mine/r.py:g", "sentiment")
    # The working directory, if only that has the file; a flag is relative to it in any case.
    file.write_text("data: here.jsonl\nreward: sentiment\n")
    assert load_config(METHODS["oaif"].config, file=file, flags={}).data == "here.jsonl"
    flags = {"data": "both.jsonl", "reward": ["r.py:f"]}
    config = load_config(METHODS["oaif"].config, file=file, flags=flags)
    assert (config.data, config.reward) == ("both.jsonl", ("r.py:f",))


def test_a_configuration_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data: x\n")
    assert load_config(Toy, file=Path("~/run.yaml"), flags={}).data == "x"
