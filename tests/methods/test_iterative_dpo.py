from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from palate import loops
from palate.errors import RunError
from palate.methods.iterative_dpo import IterativeDPOConfig
from palate.types import Group, Pair, Prompt

Taught = Callable[..., Any]
Fits = list[Sequence[Pair]]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Fits:
    """What each round learns from."""
    seen: Fits = []

    def spy(policy: Any, pairs: Sequence[Pair], *args: Any, **options: Any) -> None:
        seen.append(pairs)
        fit(policy, pairs, *args, **options)

    fit = loops.fit
    monkeypatch.setattr(loops, "fit", spy)
    return seen


@pytest.fixture
def human(tmp_path: Path) -> str:
    """A file of pairs in which capitals are the better answer."""
    rows = [{"prompt": f"q{i}", "chosen": "ABCDEF"[i:] + "X", "rejected": "abcdef"[i:]} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(("lora", "ref"), [(False, "previous"), (True, "start"), (True, "previous")])
def test_the_reward_rises(taught: Taught, lora: bool, ref: str) -> None:
    # The standard error of the rise is below 0.01: 2,048 completions of 8 tokens before and after. An adapter
    # on the layers of a random model can do less than all weights, so that it gets more rounds.
    prompts = [Prompt(f"q{i}") for i in range(64)]
    more = {"lr": 4e-2, "n": 8, "rounds": 4, "batch_size": 16} if lora else {"lr": 2e-2, "rounds": 2}
    whole = {"lora": lora, "ref": ref, "steps": 8, "temperature": 1.0, "top_p": 1.0}
    found = taught("iterative-dpo", None, prompts, **whole, **more)
    assert found.rise > 0.08
    scores = [row["objective/scores"] for row in found.rows]
    assert scores[0] < scores[-1]  # a later round samples from what an earlier one has taught


def test_the_reference_moves_with_the_rounds_or_stays(taught: Taught) -> None:
    previous, start = (
        taught("iterative-dpo", ref=ref, rounds=2, lr=1e-2, temperature=1.0, top_p=1.0).rows[3]
        for ref in ("previous", "start")
    )
    assert previous["loss"] == pytest.approx(math.log(2), abs=1e-6)  # a round begins at its reference
    assert previous["rewards/margins"] == previous["objective/kl"] == 0.0
    assert start["rewards/margins"] != 0.0
    assert start["objective/kl"] != 0.0


def test_a_round_is_a_schedule_of_its_own(taught: Taught, fits: Fits) -> None:
    found = taught("iterative-dpo", rounds=2, steps=None, epochs=1.0, schedule="linear", lr=1e-2)
    assert [row["round"] for row in found.rows] == [1, 1, 2, 2]
    assert [row["learning_rate"] for row in found.rows] == pytest.approx([1e-2, 0.5e-2] * 2)
    versions = [{c.policy_version for pair in pairs for c in pair.completions} for pairs in fits]
    assert versions == [{0}, {2}]  # each from the policy as it is then


def test_best_against_worst(taught: Taught, fits: Fits) -> None:
    sampled: list[Group] = []

    def annotate(groups: Sequence[Group]) -> list[Group]:
        found = [g.annotated(tuple(float(sum(c.token_ids) % 97) for c in g.completions)) for g in groups]
        sampled.extend(found)
        return found

    taught("iterative-dpo", annotate, rounds=1, n=5)
    for pair, group in zip(fits[0], sampled, strict=True):
        scores = dict(zip(group.completions, group.rewards or (), strict=True))
        assert scores[pair.chosen] == max(scores.values())
        assert scores[pair.rejected] == min(scores.values())


# ---- Human pairs and implicit labels ---------------------------------------------------------------


@pytest.mark.parametrize("mix", [False, True])
def test_the_first_round_learns_from_human_pairs(taught: Taught, fits: Fits, human: str, mix: bool) -> None:
    found = taught("iterative-dpo", rounds=2, pairs=human, mix_pairs=mix)
    assert {pair.chosen.text for pair in fits[0]} == {"ABCDEF"[i:] + "X" for i in range(6)}
    assert [row["round"] for row in found.rows] == [1] * 3 + [2] * 3
    assert "objective/scores" not in found.rows[0]
    assert "objective/scores" in found.rows[3]
    from_data = [pair for pair in fits[1] if pair.chosen.policy_version is None]
    assert len(from_data) == (6 if mix else 0)
    assert len(fits[1]) - len(from_data) == found.rows[3]["pairs/kept"]


@pytest.mark.parametrize("ref", ["previous", "start"])
def test_the_policy_labels_its_own_completions(taught: Taught, fits: Fits, human: str, ref: str) -> None:
    def never(groups: Sequence[Group]) -> list[Group]:
        raise AssertionError("the annotator was asked")

    found = taught("iterative-dpo", never, rounds=3, pairs=human, label="implicit", ref=ref, lr=1e-2)
    # M_1 was trained towards capitals against M_0, and prefers what has gained since then.
    assert found.rows[3]["pairs/kept"] > 8
    assert found.rows[3]["objective/scores_margin"] > 0
    assert all((pair.margin or 0) > 0 for pair in fits[1])
    # With ref "start" the label is against M_0, in whose terms what is learnt from has a margin at once.
    if ref == "start":
        assert found.rows[3]["rewards/margins"] > 0


# ---- What goes wrong -------------------------------------------------------------------------------


def test_a_round_without_a_pair(taught: Taught) -> None:
    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [g.annotated((1.0,) * len(g.completions)) for g in groups]

    with pytest.raises(RunError, match=r"round 1: none of 16 prompts gave a pair .*\(16 tie\)"):
        taught("iterative-dpo", annotate)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"label": "implicit"}, "label is implicit and pairs is not set"),
        ({"mix_pairs": True}, "mix_pairs is on, but pairs is not set"),
        ({"pairs": "p.jsonl", "rounds": 1}, "rounds is 1"),
        ({"beta": 0.0}, "beta"),
        ({"n": 1}, "n"),
        ({"ref": "last"}, "ref"),
    ],
)
def test_numbers_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IterativeDPOConfig(data="x", **wrong)


def test_defaults() -> None:
    cfg = IterativeDPOConfig(data="x")
    assert (cfg.ref, cfg.label, cfg.beta, cfg.n, cfg.temperature, cfg.top_p) == (
        "previous", "annotator", 0.1, 4, 0.7, 0.9,
    )  # fmt: skip
