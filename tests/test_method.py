from __future__ import annotations

from typing import Any, Literal, get_args

import pytest
from pydantic import ValidationError

from palate.cli.descriptions import description
from palate.config import BatchConfig, MethodConfig
from palate.errors import ConfigError
from palate.method import Method, Recipe, Way
from palate.methods import METHODS


class SampledConfig(MethodConfig, BatchConfig):
    """Numbers of a toy."""

    variant: Literal["sampled", "thinned"] = "sampled"
    """The way."""
    n: int = 4
    """Candidates."""


class DirectConfig(MethodConfig, BatchConfig):
    """Numbers of the toy on pairs."""

    variant: Literal["direct"] = "direct"
    """The way."""
    eval_every: int | None = None
    """Steps between measurements."""


def play_well(*_: Any) -> None:
    """A method."""


def read_well(*_: Any, **__: Any) -> None:
    """The same on pairs."""


RECIPE = Recipe("human", "data", "once", ("policy",))
FIXED: dict[str, Any] = {"summary": "s", "paper": "p", "group": "online", "recipe": RECIPE}
DIRECT = Way(read_well, DirectConfig, "pairs")


def method(config: type[MethodConfig] = SampledConfig, **more: Any) -> Method:
    return Method(train=play_well, config=config, learns_from="prompts", **FIXED, **more)


TWO = method(others=(DIRECT,))


def test_the_name_is_the_functions() -> None:
    assert method().name == "play-well"


def test_defaults_are_those_of_the_fields() -> None:
    defaults = method().defaults()
    assert (defaults["steps"], defaults["variant"]) == (100, "sampled")
    assert "data" not in defaults  # it has to be given


def test_the_type_of_a_configuration_tells_the_way() -> None:
    assert [way.train for way in TWO.ways] == [play_well, read_well]
    assert TWO.way_of(SampledConfig(data="x")) == TWO.ways[0]
    assert TWO.way_of(DirectConfig(data="x")) == DIRECT
    with pytest.raises(
        ConfigError, match="expects a SampledConfig or a DirectConfig, but got a MethodConfig"
    ):
        TWO.way_of(MethodConfig(data="x"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SampledConfig(data="x")),
        ({"variant": "thinned", "n": "7"}, SampledConfig(data="x", variant="thinned", n=7)),
        ({"variant": "direct", "eval_every": 2}, DirectConfig(data="x", eval_every=2)),
        ({"variant": "direct", "n": "4"}, DirectConfig(data="x")),  # its default asks for nothing
    ],
)
def test_the_variant_takes_the_way(values: dict[str, Any], expected: MethodConfig) -> None:
    made = TWO.configure({"data": "x", **values})
    assert type(made) is type(expected)
    assert made == expected


def test_an_unknown_variant_is_an_error_of_its_field() -> None:
    with pytest.raises(ValidationError, match="variant"):
        TWO.configure({"data": "x", "variant": "both"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"variant": "direct", "n": "17"},
            "variant is direct, which learns from pairs in the data and samples nothing, so n would have "
            "no effect; leave it out or use variant sampled or thinned",
        ),
        (
            {"eval_every": 1},
            "variant is sampled, which learns from completions that it samples, so eval_every would "
            "have no effect; leave it out or use variant direct",
        ),
    ],
)
def test_a_field_that_does_nothing_in_a_way_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        TWO.choose({"data": "x", **values})


def test_options_are_the_fields_of_all_ways() -> None:
    assert method().options is SampledConfig
    fields = TWO.options.model_fields
    assert fields.keys() == SampledConfig.model_fields.keys() | DirectConfig.model_fields.keys()
    assert get_args(fields["variant"].annotation) == ("sampled", "thinned", "direct")
    assert fields["variant"].default == "sampled"
    assert description(TWO.options, "variant") == "The way."


@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if "direct" in m.ways[-1].variants])
def test_a_way_on_pairs_has_no_fields_of_sampling_and_measures_held_out_pairs(name: str) -> None:
    direct = METHODS[name].variant("direct").config
    assert "n" not in direct.model_fields
    assert "eval_every" not in METHODS[name].config.model_fields
    described = METHODS[name].configure({"data": "x", "variant": "direct", "eval_every": 1})
    assert type(described) is direct
    assert METHODS[name].configure(described.model_dump()) == described


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rest", {}),
        ("click", {}),
        ("rft", {"rounds": 2, "from_rounds": "best"}),
    ],
)
def test_a_ranker_is_refused_where_rewards_of_different_prompts_are_compared(
    name: str, options: dict[str, object]
) -> None:
    asked = {"data": "x", "reward": ["ranker:r"], **options}
    with pytest.raises(ValidationError, match="'ranker:r', whose numbers are comparable within one prompt"):
        METHODS[name].config.model_validate(asked)
    METHODS[name].config.model_validate({**asked, "reward": ["model:r"]})


def test_click_takes_a_ranker_where_it_has_no_threshold() -> None:
    METHODS["click"].configure({"data": "x", "reward": ["ranker:r"], "variant": "direct"})


@pytest.mark.parametrize("options", [{"rounds": 1}, {"from_rounds": "all"}, {"from_rounds": "last"}])
def test_rft_takes_a_ranker_where_rounds_do_not_meet(options: dict[str, object]) -> None:
    METHODS["rft"].config.model_validate({"data": "x", "reward": ["ranker:r"], **options})
