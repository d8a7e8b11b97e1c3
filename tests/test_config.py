from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from palate.config import Sampling
from palate.methods import METHODS
from palate.methods.oaif import OAIFConfig

PAPER = Path(__file__).parent.parent / "configs" / "paper"


@pytest.mark.parametrize(
    ("rewards", "penalty"),
    [
        ((), 0.0),
        (("sentiment",), 0.0),
        (("ranker:x",), 0.0),
        (("model:x",), 1.0),
        (("sentiment", "0.5 * model:x"), 1.0),
    ],
)
def test_cut_completions_cost_something_where_a_model_scores(
    rewards: tuple[str, ...], penalty: float
) -> None:
    assert OAIFConfig(data="x", reward=rewards).missing_eos_penalty == penalty
    assert OAIFConfig(data="x", reward=rewards, missing_eos_penalty=0.25).missing_eos_penalty == 0.25


def test_an_answer_has_room() -> None:
    assert Sampling().max_new_tokens == 256


@pytest.mark.parametrize("steps", [149, 150])
def test_a_warm_up_that_takes_all_steps(steps: int) -> None:
    with pytest.raises(ValidationError, match=f"warmup_steps is 150, but there are only {steps} steps"):
        OAIFConfig(data="x", warmup_steps=150, steps=steps)
    OAIFConfig(data="x", warmup_steps=150, steps=151)


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.1), ("ipo", 1.0), ("hinge_norm", 0.002)])
def test_the_loss_of_the_paper_chooses_its_beta(loss: str, beta: float) -> None:
    numbers = yaml.safe_load((PAPER / "oaif.yaml").read_text(encoding="utf-8"))
    cfg = METHODS["oaif"].configure({**numbers, "data": "x", "loss": loss})
    assert cfg.model_dump()["beta"] == beta


def test_unrestricted_sampling_keeps_where_a_completion_ends() -> None:
    sampling = Sampling(
        temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2, min_new_tokens=2,
        max_new_tokens=9, stop=("x",), sampling_rows=4,
    )  # fmt: skip
    assert sampling.unrestricted == Sampling(max_new_tokens=9, stop=("x",), sampling_rows=4)
