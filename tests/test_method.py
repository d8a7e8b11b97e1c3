from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ValidationError

from palate.config import BatchConfig, MethodConfig
from palate.learn import Policy
from palate.method import Method, Recipe
from palate.methods import METHODS


class TwoWays(MethodConfig, BatchConfig):
    """Numbers of a toy."""

    variant: Literal["direct", "sampled"] = "sampled"
    """Which way."""


def play_well(*_: Any) -> None:
    """A method."""


def read_well(*_: Any, **__: Any) -> None:
    """The same on pairs."""


RECIPE = Recipe("human", "data", "once", ("policy",))
FIXED: dict[str, Any] = {"summary": "s", "paper": "p", "group": "online", "recipe": RECIPE}


def method(config: type[MethodConfig] = TwoWays, **more: Any) -> Method:
    return Method(train=play_well, config=config, learns_from="prompts", **FIXED, **more)


def test_the_name_is_the_functions() -> None:
    assert method().name == "play-well"


def test_defaults_are_those_of_the_fields() -> None:
    defaults = method().defaults()
    assert (defaults["steps"], defaults["variant"]) == (100, "sampled")
    assert "data" not in defaults  # it has to be given


def test_a_policy_is_what_is_learnt_unless_it_is_said() -> None:
    assert method().learner == Policy.load


def test_the_direct_way_is_taken_when_it_is_asked_for() -> None:
    both = method(direct=read_well)
    assert both.way(TwoWays(data="x")) == (play_well, "prompts")
    assert both.way(TwoWays(data="x", variant="direct")) == (read_well, "pairs")


def test_a_method_without_a_direct_way() -> None:
    assert method().way(TwoWays(data="x", variant="direct")) == (play_well, "prompts")
    assert method(MethodConfig, direct=read_well).way(MethodConfig(data="x")) == (play_well, "prompts")


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.direct is not None])
def test_what_has_no_held_out_pairs_is_not_asked_to_measure_them(name: str) -> None:
    config = METHODS[name].config
    with pytest.raises(ValidationError, match="eval_every measures on held-out pairs, which variant direct"):
        config(data="x", eval_every=1)  # type: ignore[call-arg]
    assert config(data="x", eval_every=1, variant="direct").eval_every == 1  # type: ignore[call-arg, attr-defined]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.direct is not None])
def test_variant_direct_takes_nothing_that_only_sampling_heeds(name: str) -> None:
    config = METHODS[name].config
    with pytest.raises(ValidationError, match=r"samples nothing.*so n would do nothing; leave it out"):
        config.model_validate({"data": "x", "variant": "direct", "n": 17})
    # What a run has written of itself names every field; its defaults are no request.
    described = config.model_validate({"data": "x", "variant": "direct"})
    assert config.model_validate(described.model_dump()) == described


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rest", {}),
        ("click", {}),
        ("rft", {"rounds": 2}),
    ],
)
def test_a_ranker_is_refused_where_rewards_of_different_prompts_are_compared(
    name: str, options: dict[str, object]
) -> None:
    asked = {"data": "x", "reward": ["ranker:r"], **options}
    with pytest.raises(ValidationError, match="'ranker:r', whose numbers are of each prompt's own"):
        METHODS[name].config.model_validate(asked)
    METHODS[name].config.model_validate({**asked, "reward": ["model:r"]})


def test_click_takes_a_ranker_where_it_has_no_threshold() -> None:
    METHODS["click"].config.model_validate({"data": "x", "reward": ["ranker:r"], "variant": "direct"})


@pytest.mark.parametrize("options", [{"rounds": 1}, {"pool": "all"}, {"pool": "none"}])
def test_rft_takes_a_ranker_where_rounds_do_not_meet(options: dict[str, object]) -> None:
    METHODS["rft"].config.model_validate({"data": "x", "reward": ["ranker:r"], **options})
