from __future__ import annotations

from palate.cli.descriptions import description
from palate.config import Config, ModelConfig


class Part(Config):
    a: int = 1
    """The first
    field."""
    b: int = 2
    c: int = 3
    """The third field."""


class Whole(Part):
    """No text of a field."""

    c: int = 4
    d: int = 5

    class Inner(Config):
        d: int = 0
        """Of the inner class."""


def test_the_text_under_a_field() -> None:
    assert description(Part, "a") == "The first\nfield."
    assert description(Part, "b") == ""
    assert description(ModelConfig, "lora_rank") == "Rank of the adapter."


def test_a_changed_default_keeps_the_text_of_its_part() -> None:
    assert description(Whole, "c") == "The third field."
    assert description(Whole, "d") == ""
    assert description(Whole.Inner, "d") == "Of the inner class."


def test_a_class_within_a_function() -> None:
    class Local(Part):
        e: int = 0
        """Of the local class."""

    assert description(Local, "e") == "Of the local class."
    assert description(Local, "a") == "The first\nfield."
