from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.arguments import EVERYDAY_HELD_OUT, configured, method_named
from palate.errors import ConfigError
from palate.methods import METHODS
from palate.methods.oaif import OAIFConfig

OAIF = METHODS["oaif"]
DATA = {"data": "x.jsonl"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**DATA, "stpes": 5},
            "unknown setting stpes; did you mean steps? `palate run oaif --help` lists the settings",
        ),
        ({**DATA, "zzz": 5}, "unknown setting zzz; `palate run oaif --help` lists the settings"),
        ({**DATA, "beta": 0}, "beta is 0, expected a number greater than 0"),
        ({**DATA, "beta": True}, "beta is true, expected a number greater than 0"),
        ({**DATA, "loss": "dop"}, "loss is 'dop', expected one of dpo, ipo, hinge_norm, did you mean dpo?"),
        ({}, "data is missing, give data= or the key `data` in a configuration file"),
        (
            {**DATA, "tokenizer": object()},
            "tokenizer is given and model is None, expected a loaded model; a name brings its own tokenizer",
        ),
    ],
)
def test_mistakes_read_as_on_the_command_line(settings: dict[str, Any], message: str) -> None:
    tokenizer = settings.pop("tokenizer", None)
    with pytest.raises(ConfigError) as caught:
        configured(OAIF, None, settings, tokenizer)
    assert str(caught.value) == message


def test_a_setting_of_another_variant() -> None:
    with pytest.raises(ConfigError, match=r"variant is direct, .* accept would have no effect; leave it out"):
        configured(METHODS["rso"], None, {**DATA, "variant": "direct", "accept": 9})


def test_unknown_methods() -> None:
    with pytest.raises(ConfigError) as caught:
        method_named("oafi", METHODS)
    assert (
        str(caught.value) == "unknown method 'oafi'; did you mean 'oaif'? `palate methods` lists the methods"
    )


def test_a_configuration_is_used_as_it_is() -> None:
    cfg = OAIFConfig(data="everyday")
    assert configured(OAIF, cfg, {}) is cfg
    with pytest.raises(ConfigError, match="both a OAIFConfig and steps are given"):
        configured(OAIF, cfg, {"steps": 5})
    wrong: Any = {"data": "x"}
    with pytest.raises(ConfigError, match="the configuration is a dict, expected a OAIFConfig or the path"):
        configured(OAIF, wrong, {})


def test_settings_win_over_a_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: x.jsonl\nsteps: 7\nbeta: 0.2\n")
    for path in (file, str(file)):
        cfg: Any = configured(OAIF, path, {"steps": 5})
        assert (cfg.data, cfg.steps, cfg.beta) == ("x.jsonl", 5, 0.2)
    file.write_text("dta: x.jsonl\n")
    with pytest.raises(ConfigError, match=r"unknown key `dta` \(line 1 of .*run.yaml\).*did you mean `data`"):
        configured(OAIF, file, {})


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("oaif", {}, ("everyday", "test", EVERYDAY_HELD_OUT)),
        ("oaif", {"eval_limit": 3}, ("everyday", "test", 3)),
        ("oaif", {"eval_data": None}, (None, "test", None)),
        ("oaif", {"eval_data": "mine.jsonl"}, ("mine.jsonl", "test", None)),
        ("oaif", {"data": "mine.jsonl"}, (None, "test", None)),
        ("dpo", {}, (None, "test", None)),  # `everyday` has no pairs
    ],
)
def test_everyday_has_held_out_prompts(method: str, settings: dict[str, Any], expected: object) -> None:
    cfg = configured(METHODS[method], None, {"data": "everyday", **settings})
    assert (cfg.eval_data, cfg.eval_split, cfg.eval_limit) == expected
