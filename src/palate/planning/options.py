"""The options of `palate plan`. This module loads neither torch nor numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BeforeValidator, Field, field_validator, model_validator

from palate.config import EMBEDDED, Config, Names, split_commas

Asset = Literal["prompts", "pairs", "demonstrations", "ranks", "reward", "judge"]
"""What a user may have to train with."""

ASSETS: tuple[str, ...] = get_args(Asset)

MANY = 1000
"""Number of rows of a data set whose size is not given."""


class PlanOptions(Config):
    """Plan"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}
    """Flags that are not named like their field."""
    unoffered: ClassVar[frozenset[str]] = frozenset()

    pilot: int = Field(16, ge=0)
    """Completions to sample first, from which the expectations follow; then about ten seconds of sampling and
    training are timed. 0 loads no model and shows upper bounds only."""
    devices: int = Field(1, ge=1)
    """Number of devices that share a batch; memory is shown per device."""
    json_only: bool = False
    """Print JSON and nothing else on stdout."""


class ChooseOptions(Config):
    """Choice"""

    flags: ClassVar[Mapping[str, str]] = {"json_only": "--json"}

    have: Annotated[Names, BeforeValidator(split_commas)] = Field(min_length=1)
    """Your means, separated by commas: `prompts`, `pairs`, `demonstrations`, `ranks` (several ranked answers
    per prompt), `reward` (a function or a reward model) and `judge` (a language model that judges). A number
    of rows may follow, as in `pairs=500`; default: 1000."""
    memory: float | None = Field(None, gt=0)
    """Memory of one device, in GB; default: not limited."""
    money: float | None = Field(None, ge=0)
    """Most dollars for the judge, by price_in and price_out; default: not limited."""
    hours: float | None = Field(None, gt=0)
    """Most hours of the run on this machine; the model is loaded and timed for ten seconds. Default: not
    limited, and nothing is timed."""
    model: str = EMBEDDED
    """Model to train: a hub id, a directory, or `smollm2`."""
    devices: int = Field(1, ge=1)
    """Number of devices that share a batch."""
    lora: bool = True
    """Train a LoRA adapter; with false, all weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the model's weights."""
    prompt_tokens: int = Field(50, ge=1)
    """Mean length of a prompt, in tokens."""
    max_new_tokens: int = Field(256, ge=1)
    """Maximum number of tokens per completion. Plans count every completion at this length."""
    price_in: float = Field(0.0, ge=0)
    """Dollars per million tokens that the judge reads."""
    price_out: float = Field(0.0, ge=0)
    """Dollars per million tokens that the judge writes."""
    json_only: bool = False
    """Print JSON and nothing else on stdout."""

    @field_validator("have")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for item in given:
            name, equals, count = item.partition("=")
            if name not in ASSETS:
                raise ValueError(f"have contains {name!r}, expected some of {', '.join(ASSETS)}")
            if equals and not (count.isdigit() and int(count)):
                raise ValueError(f"have contains {item!r}, expected a number of rows, as in {name}=500")
        return given

    @model_validator(mode="after")
    def _money_has_prices(self) -> Self:
        if self.money is not None and "judge" in self.counts and not self.priced:
            raise ValueError(
                f"money is {self.money:g}, but the judge's price is not given; give --price-in and "
                "--price-out in dollars per million tokens, or leave --money out"
            )
        return self

    @property
    def priced(self) -> bool:
        """True if the judge has a price."""
        return self.price_in > 0 or self.price_out > 0

    @property
    def counts(self) -> dict[str, int]:
        """The number of rows of each kind of data that the user has; a reward and a judge count 1."""
        split = (item.partition("=") for item in self.have)
        return {name: int(count or (1 if name in ("reward", "judge") else MANY)) for name, _, count in split}
