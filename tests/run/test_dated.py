"""A run whose chat template prints the date, interrupted and resumed on another day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import palate
from palate.testing import CHAT
from palate.types import Group

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ROWS = [{"prompt": f"question {i}", "chosen": "Yes, " * (i + 1), "rejected": "No."} for i in range(4)]
PLACES = ("palate.model.codec.codec.datetime", "palate.launch.datetime")


class Interrupting(palate.Display):
    """A display at which the user presses Ctrl-C when a step ends."""

    def __init__(self, at: int | None) -> None:
        super().__init__(quiet=True)
        self.at = at

    def metrics(self, row: Mapping[str, float], samples: Sequence[Group]) -> None:
        if row["step"] == self.at:
            raise KeyboardInterrupt


def letters(completions: list[str]) -> list[float]:
    return [float(sum(map(ord, text))) for text in completions]


def train(method: str, directory: Path, model: str, template: Path, *, at: int | None = None) -> Any:
    options: dict[str, Any] = {"steps": 4, "batch_size": 2, "checkpoint_every": 1, "lr": 1e-2}
    if method == "oaif":
        options |= {"n": 2, "max_new_tokens": 6, "reward": letters}
    return palate.train(
        method,
        model=model,
        device="cpu",
        dtype="float32",
        data=ROWS,
        output=directory,
        **{"chat_template": template, "display": Interrupting(at), **options},
    )


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the day."""

    def set_day(day: int) -> None:
        class Now(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(2026, 3, day, 12)

        for place in PLACES:
            monkeypatch.setattr(place, Now)

    return set_day


@pytest.mark.parametrize("method", ["dpo", "oaif"])
def test_a_run_keeps_its_date(tiny: str, tmp_path: Path, on: Any, method: str) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("<bos>system:Today is {{ strftime_now('%d %B %Y') }}.<end>" + CHAT)

    def weights(name: str) -> dict[str, Any]:
        return dict(load_file(tmp_path / name / "checkpoints" / "step-4" / "adapter_model.safetensors"))

    on(1)
    uncut = train(method, tmp_path / "whole", tiny, template)
    with pytest.raises(KeyboardInterrupt):
        train(method, tmp_path / "cut", tiny, template, at=3)
    on(4)
    resumed = train(method, tmp_path / "cut", tiny, template)
    assert resumed.summary["steps"] == uncut.summary["steps"] >= 3
    whole, cut = weights("whole"), weights("cut")
    assert all(whole[name].equal(cut[name]) for name in whole)
    # The date matters: a run that begins on this day is another one.
    train(method, tmp_path / "other", tiny, template)
    other = weights("other")
    assert any(not whole[name].equal(other[name]) for name in whole)
