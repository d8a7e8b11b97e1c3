from __future__ import annotations

import math
import random
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from palate.annotate import Annotator, scored
from palate.learn import Policy
from palate.methods.oaif import OAIFConfig, oaif
from palate.run import Run
from palate.testing import ScriptedScorer
from palate.types import Group, Prompt

WANTED = frozenset(string.ascii_letters + string.digits)
PROMPTS = [Prompt(f"q{i}") for i in range(16)]
BETA = {"dpo": 0.1, "ipo": 0.02, "hinge_norm": 0.02}
"""Weak pulls to the reference: the test is whether the reward is learnt, in few steps."""


def share(text: str) -> float:
    """Share of letters and digits: a quarter of what the untrained model says."""
    return sum(c in WANTED for c in text) / max(1, len(text))


Trained = tuple[list[dict[str, Any]], Policy]


@pytest.fixture
def train(base: str, tmp_path: Path, rows: Callable[[Run], list[dict[str, Any]]]) -> Callable[..., Trained]:
    """Run OAIF on the base model; the rows of metrics and the policy."""

    def go(annotate: Annotator | None = None, **options: Any) -> Trained:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        defaults = {"steps": 3, "batch_size": 4, "max_new_tokens": 8, "lora": False, "lr": 1e-2}
        fixed = {"model": base, "data": "-", "output": output, "dtype": "float32", "device": "cpu"}
        cfg = OAIFConfig.model_validate(defaults | fixed | options)
        annotate = annotate or scored(ScriptedScorer(share))
        with Run(cfg, method="oaif") as run:
            policy = Policy.load(cfg, total_steps=cfg.steps, seed=run.seed("adapter"))
            oaif(policy, annotate, PROMPTS, cfg, run)
        return rows(run), policy

    return go


def rise(found: list[dict[str, Any]]) -> float:
    """Mean reward of the last five steps, less that of the first five."""
    scores = [row["objective/scores"] for row in found]
    return mean(scores[-5:]) - mean(scores[:5])


ENOUGH = 0.12
"""Ten standard errors of `rise`: shares of 8 tokens, at least 32 completions a step, 5 steps each side."""


def settings(loss: str, n: int, lora: bool, seed: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "beta": BETA[loss],
        "n": n,
        "lora": lora,
        "seed": seed,
        "steps": 30,
        "batch_size": 16,
    }


@pytest.mark.parametrize(
    ("loss", "n", "lora", "seed"),
    [
        ("dpo", 2, False, 0),
        ("dpo", 2, False, 1),
        ("dpo", 2, False, 2),
        ("dpo", 2, True, 0),
        ("dpo", 4, False, 1),
        ("dpo", 4, True, 2),
        ("ipo", 2, False, 0),
        ("ipo", 2, True, 1),
        ("ipo", 4, False, 2),
        ("ipo", 4, True, 0),
        ("hinge_norm", 2, False, 1),
        ("hinge_norm", 2, True, 2),
        ("hinge_norm", 4, False, 0),
        ("hinge_norm", 4, True, 1),
    ],
)
def test_the_reward_rises(train: Callable[..., Trained], loss: str, n: int, lora: bool, seed: int) -> None:
    found, _ = train(**settings(loss, n, lora, seed))
    assert rise(found) > ENOUGH
    # At temperature 0.9 the mean log-ratio of the samples is no KL, and is not logged as one.
    assert not any("objective/kl" in row for row in found)
    assert max(abs(row.get("rewards/chosen", 0.0)) for row in found) > 0  # it has left the reference


def test_a_reward_that_says_nothing_is_not_raised(train: Callable[..., Trained]) -> None:
    # A run on rewards that are drawn at random is a random walk, which takes another path on each processor.
    # So the mean of two walks is compared with the rise of the same run on a reward that says something.
    def walk(seed: int) -> float:
        noise = random.Random(seed)
        true: list[float] = []

        def annotate(groups: Sequence[Group]) -> list[Group]:
            true.append(mean(share(c.text) for g in groups for c in g.completions))
            return [g.annotated(tuple(noise.random() for _ in g.completions)) for g in groups]

        train(annotate, **settings("dpo", 2, False, seed))
        return mean(true[-5:]) - mean(true[:5])

    learnt, _ = train(**settings("dpo", 2, False, 0))
    assert abs(mean(walk(seed) for seed in range(2))) < rise(learnt) / 2


@pytest.mark.parametrize(
    ("loss", "first"), [("dpo", math.log(2)), ("ipo", (1 / (2 * 0.02)) ** 2), ("hinge_norm", 1.0)]
)
@pytest.mark.parametrize("lora", [False, True])
def test_the_first_step_starts_at_the_reference(
    train: Callable[..., Trained], loss: str, first: float, lora: bool
) -> None:
    (row,), _ = train(loss=loss, beta=BETA[loss], lora=lora, steps=1, temperature=1.0)
    assert row["loss"] == pytest.approx(first, rel=1e-6)
    assert (row["rewards/chosen"], row["rewards/rejected"], row["rewards/margins"]) == (0.0, 0.0, 0.0)
    assert row["rewards/accuracies"] == 0.5  # a margin of zero prefers neither
    assert row["objective/kl"] == 0.0
    assert row["grad_norm"] > 0
    assert row["beta"] == BETA[loss]


def test_every_step_learns_from_what_the_policy_says_now(train: Callable[..., Trained]) -> None:
    # Were the sampler a step behind, its log-probabilities would not be the learner's.
    found, _ = train(steps=6, lora=True)
    assert all(row["sampling/sampling_logp_difference/max"] < 1e-4 for row in found)
    assert found[-1]["rewards/chosen"] != 0  # while the reference has stayed behind


def test_a_higher_score_is_chosen(train: Callable[..., Trained]) -> None:
    # The chosen ones gain on the rejected ones, and not the other way round.
    found, _ = train(steps=20, batch_size=16)
    assert mean(row["rewards/margins"] for row in found[10:]) > 0
    assert mean(row["rewards/accuracies"] for row in found[10:]) > 0.5


# ---- Ties ------------------------------------------------------------------------------------------


def ties_for(tied: Callable[[Prompt], bool]) -> Annotator:
    """Rewards that tie on some prompts and differ on the others."""

    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [
            g.annotated(tuple(0.0 if tied(g.prompt) else hash(c.token_ids) % 997 for c in g.completions))
            for g in groups
        ]

    return annotate


def test_ties_are_dropped_and_counted(train: Callable[..., Trained]) -> None:
    # Batches of 16 go through all prompts, so each step has the same ones among them.
    found, policy = train(ties_for(lambda p: int(p.text[1:]) < 5), batch_size=16)
    for row in found:
        assert (row["pairs/kept"], row["pairs/dropped"], row["pairs/dropped_tie"]) == (11, 5, 5)
        assert (row["pairs/dropped_identical"], row["pairs/dropped_unusable"]) == (0, 0)
    assert policy.version == 3


def test_what_ties_is_not_learnt_from(
    train: Callable[..., Trained], weights: Any, equal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The same step, once with tied groups in the batch and once with those groups not given on at all.
    tied = ties_for(lambda p: int(p.text[1:]) % 2 == 0)

    def without(groups: Sequence[Group]) -> list[Group]:
        return [g for g in tied(groups) if int(g.prompt.text[1:]) % 2]

    one, other = (weights(train(annotate, batch_size=16)[1]) for annotate in (tied, without))
    assert equal(one, other)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_step_in_which_every_pair_ties_changes_nothing(
    train: Callable[..., Trained], base: str, weights: Any, equal: Any, lora: bool, reward: float
) -> None:
    found, policy = train(scored(ScriptedScorer(lambda text: reward)), lora=lora, weight_decay=0.1)
    _, untrained = train(scored(ScriptedScorer(lambda text: reward)), lora=lora, steps=1)
    assert equal(weights(policy), weights(untrained))
    assert policy.version == 0
    assert [row["step"] for row in found] == [1, 2, 3]  # logged all the same
    for row in found:
        assert (row["pairs/kept"], row["pairs/dropped"], row["pairs/dropped_tie"]) == (0, 4, 4)
        assert row["objective/scores"] == reward
        assert row["frac_reward_zero_std"] == 1.0
        assert "loss" not in row
        assert "grad_norm" not in row


def test_learning_goes_on_after_a_step_of_ties(
    train: Callable[..., Trained], weights: Any, equal: Any
) -> None:
    calls = 0

    def annotate(groups: Sequence[Group]) -> list[Group]:
        nonlocal calls
        calls += 1
        return ties_for(lambda p: calls == 2)(groups)

    found, policy = train(annotate)
    assert [("loss" in row) for row in found] == [True, False, True]
    assert policy.version == 2
    # Adam's memory of the first step must not move weights in the second.
    _, one_step = train(ties_for(lambda p: False), steps=1)
    calls = 0
    _, two_steps = train(annotate, steps=2)
    assert equal(weights(one_step), weights(two_steps))


def test_the_tie_threshold(train: Callable[..., Trained]) -> None:
    annotate = scored(ScriptedScorer(lambda text: float(len(text) % 2)))  # 0 or 1
    found, policy = train(annotate, tie=1.0)
    assert policy.version == 0
    assert all(row["pairs/dropped_tie"] == 4 for row in found)
    assert train(annotate, tie=0.99)[1].version > 0


def test_completions_without_a_reward_are_never_chosen(train: Callable[..., Trained]) -> None:
    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [g.annotated((None, 1.0) if int(g.prompt.text[1:]) < 3 else (0.0, 1.0)) for g in groups]

    found, _ = train(annotate, batch_size=16)
    for row in found:
        assert (row["pairs/dropped_unusable"], row["pairs/kept"]) == (3, 13)
        assert row["objective/unusable"] == 3


# ---- Seeds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_seed_decides_the_weights_to_the_last_bit(
    train: Callable[..., Trained], weights: Any, equal: Any, lora: bool
) -> None:
    state = torch.random.get_rng_state()
    one = weights(train(lora=lora, seed=1)[1])
    torch.manual_seed(123)  # what else is drawn in the process has no part in it
    assert equal(one, weights(train(lora=lora, seed=1)[1]))
    assert not equal(one, weights(train(lora=lora, seed=2)[1]))
    torch.random.set_rng_state(state)


def test_every_prompt_in_turn_in_an_order_of_the_seed(train: Callable[..., Trained]) -> None:
    def asked(seed: int) -> list[str]:
        seen: list[str] = []

        def annotate(groups: Sequence[Group]) -> list[Group]:
            seen.extend(g.prompt.text for g in groups)
            return scored(ScriptedScorer(share))(groups)

        train(annotate, seed=seed, steps=4)
        return seen

    one, other = asked(1), asked(2)
    assert sorted(one) == sorted(other) == sorted(p.text for p in PROMPTS)  # 4 steps of 4: an epoch
    assert one != other


# ---- Configuration ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.1), ("ipo", 1.0), ("hinge_norm", 0.002)])
def test_beta_is_the_papers_for_each_loss(loss: str, beta: float) -> None:
    assert OAIFConfig(data="x", loss=loss).beta == beta  # type: ignore[arg-type]
    assert OAIFConfig(data="x", loss=loss, beta=0.3).beta == 0.3  # type: ignore[arg-type]


def test_defaults_are_the_papers() -> None:
    cfg = OAIFConfig(data="x")
    assert (cfg.loss, cfg.n, cfg.temperature, cfg.tie) == ("dpo", 2, 0.9, 0.0)
    assert OAIFConfig(data="x", lora=False).lr == OAIFConfig.vetted_lr["full"]


@pytest.mark.parametrize("loss", [["dpo"], {"a": 1}, 3, None, "slic"])
def test_a_loss_of_the_wrong_kind_is_a_plain_mistake(loss: Any) -> None:
    with pytest.raises(ValidationError, match="loss"):
        OAIFConfig(data="x", loss=loss)
