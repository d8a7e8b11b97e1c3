from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from palate.config import RewardConfig, Sampling
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


def test_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = METHODS["oaif"].config(
        data="x", output="~/out", chat_template="~/t.jinja", eval_reward="~/r.py:g",
        reward=["~/r.py:f", "-0.5 * ~/r.py:f", "model:~/judge", "regex:~/x"],
    )  # fmt: skip
    assert isinstance(cfg, RewardConfig)
    assert (cfg.output, cfg.chat_template) == (tmp_path / "out", tmp_path / "t.jinja")
    assert cfg.eval_reward == (f"{tmp_path}/r.py:g",)
    assert cfg.reward[:2] == (f"{tmp_path}/r.py:f", f"-0.5 * {tmp_path}/r.py:f")
    assert cfg.reward[2:] == (f"model:{tmp_path}/judge", "regex:~/x")


def test_a_weighted_function_stays_a_pair() -> None:
    def mine(completions: list[str]) -> list[float]:
        return [0.0 for _ in completions]

    for given in ((0.5, mine), [(0.5, mine), "sentiment"]):
        cfg = METHODS["oaif"].config(data="x", reward=given)
        assert isinstance(cfg, RewardConfig)
        assert getattr(cfg.reward[0], "weight", None) == 0.5


def test_no_tracker() -> None:
    assert METHODS["oaif"].config(data="x", report_to="none").report_to == ()
