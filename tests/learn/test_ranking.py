import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from palate.config import LearnerConfig
from palate.learn import Learner, Likelihood, Policy, RankedGroups, Ranking
from palate.model import Outputs, TokenValues, ragged
from palate.types import Comparison, Completion, Group, Pair, Prompt

MakePolicy = Callable[..., Policy]

# ---- RankedGroups ----------------------------------------------------------------------------------

# Means -1, -2, -3 in a group of three, then -0.5, -4 in one of two.
ROWS = [[-0.5, -1.5], [-2.0], [-3.0, -3.0, -3.0], [-0.5], [-4.0, -4.0]]


def outputs() -> Outputs:
    logps = ragged([torch.tensor(row) for row in ROWS])
    return Outputs(logps=TokenValues(logps.values.requires_grad_(), logps.mask))


def slopes_of(made: Outputs) -> list[list[float]]:
    """Gradient by the log-probability of every token; what stands on padding is no token's."""
    return [row.tolist() for row in TokenValues(made.logps.values.grad, made.logps.mask).rows()]


def groups(*rewards: tuple[float | None, ...]) -> list[Group]:
    sizes = iter(len(row) for row in ROWS)
    return [
        Group(Prompt("Q"), tuple(Completion("", (1,) * next(sizes)) for _ in row), row) for row in rewards
    ]


def test_rewards_are_compared_in_float64_and_infinite_ones_never_win() -> None:
    # 16,777,217 is no float32; the infinite ones take no part, or they would be best and worst.
    ranked, plain = outputs(), outputs()
    close = groups((16_777_216.0, 16_777_217.0, math.inf), (-math.inf, 3.0))
    loss, numbers = RankedGroups()(ranked, close)
    expected, _ = RankedGroups()(plain, groups((0.0, 1.0, None), (None, 3.0)))
    assert loss.tolist() == expected.tolist()
    assert numbers["logps/chosen"].tolist() == [-2.0, -4.0 * 2]
    assert numbers["rank_loss"].tolist() == [1.0, 0.0]


def numbers_of(numbers: dict) -> dict[str, list[float]]:
    assert not any(values.requires_grad for values in numbers.values())
    return {name: pytest.approx(values.tolist(), nan_ok=True) for name, values in numbers.items()}


def test_ranked_groups_by_hand() -> None:
    # Means -1, -2, -3 with rewards 0, 2, 1. Worse against better: max(0, -1 + 2) = 1, max(0, -1 + 3) = 2,
    # max(0, -3 + 2) = 0. The best is the second, of log-probability -2: 3 + 2. In the other group the order
    # is right: 0 + 0.5.
    made = outputs()
    loss, numbers = RankedGroups()(made, groups((0.0, 2.0, 1.0), (5.0, -5.0)))
    assert loss.tolist() == pytest.approx([5.0, 0.5])
    assert numbers_of(numbers) == {
        "rank_loss": [3.0, 0.0],
        "nll_loss": [2.0, 0.5],
        "logps/chosen": [-2.0, -0.5],
        # Better minus worse: -2 + 1, -3 + 1, -2 + 3, and -0.5 + 4.
        "rewards/accuracies": [1 / 3, 1.0],
        "rewards/margins": [-2 / 3, 3.5],
    }
    # The first completion is pushed down twice, by 1/2 a token; the second up by one rank and its likelihood,
    # the third up by one rank, 1/3 a token.
    loss.sum().backward()
    expected = [[1, 1], [-2], [-1 / 3] * 3, [-1], [0, 0]]
    assert slopes_of(made) == [pytest.approx(row) for row in expected]


def test_a_completion_without_reward_takes_no_part() -> None:
    made = outputs()
    loss, numbers = RankedGroups()(made, groups((None, 2.0, 2.0), (None, -5.0)))
    # Equal rewards are no order; the first of the best is imitated. One reward alone ranks nothing.
    assert loss.tolist() == pytest.approx([2.0, 8.0])
    assert numbers["rank_loss"].tolist() == [0.0, 0.0]
    assert all(math.isnan(value) for value in numbers["rewards/accuracies"].tolist())
    assert all(math.isnan(value) for value in numbers["rewards/margins"].tolist())
    loss.sum().backward()
    assert slopes_of(made) == [[0, 0], [-1], [0, 0, 0], [0], [-1, -1]]


def test_negative_rewards_beside_none() -> None:
    # What stands in for a missing reward must not be taken for the best.
    _, numbers = RankedGroups()(outputs(), groups((-2.0, None, -1.0), (None, -1.0)))
    assert numbers["logps/chosen"].tolist() == [-9.0, -8.0]


def test_the_terms_of_a_ranked_group_are_weighed() -> None:
    objective = RankedGroups(Likelihood("mean"), rank_weight=10.0)
    loss, numbers = objective(outputs(), groups((0.0, 1.0, 2.0), (1.0, 2.0)))
    # Ranks: (-1 + 2) + (-1 + 3) + (-2 + 3) = 4 and -0.5 + 4 = 3.5; means of the best -3 and -4.
    assert loss.tolist() == pytest.approx([40 + 3, 35 + 4])
    assert numbers["rank_loss"].tolist() == pytest.approx([4.0, 3.5])


def annotated(policy: Policy) -> list[Group]:
    rows = [
        ("Hello there", [("bad", 0.0), ("a good one", 1.0), ("", None), ("fair", 0.5)]),
        ("Q", [("x", 2.0), ("something longer", -1.0)]),
        ("", [("only one has a reward", None), ("y", 0.0)]),
    ]
    return [
        Group(
            Prompt(prompt),
            tuple(policy.model.codec.completion(Prompt(prompt), text) for text, _ in row),
            tuple(reward for _, reward in row),
        )
        for prompt, row in rows
    ]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])
def test_ranked_groups_in_micro_batches(
    make_policy: MakePolicy, micro_batches_change_nothing: Callable[..., None], fast: bool
) -> None:
    def make(budget: int) -> Policy:
        return make_policy(model={"fast": fast}, micro_batch_tokens=budget)

    micro_batches_change_nothing(make, annotated, RankedGroups(rank_weight=20.0))


def test_ranked_groups_are_learnt(make_policy: MakePolicy) -> None:
    policy = make_policy(lr=1e-2)
    objective = RankedGroups(Likelihood("mean"), rank_weight=20.0)
    found = [policy.update(annotated(policy), objective) for _ in range(8)]
    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["rank_loss"] < found[0]["rank_loss"]
    assert found[-1]["rewards/accuracies"] > found[0]["rewards/accuracies"]


# ---- Ranking ---------------------------------------------------------------------------------------


def pair(margin: float | None = None) -> Pair:
    return Pair(Prompt("Q"), Completion("a", (1,)), Completion("b", (2,)), margin)


def test_ranking_by_hand() -> None:
    # Differences 1 and -0.5: log(1 + e^-1) = 0.313262 and log(1 + e^0.5) = 0.974077.
    scores = torch.tensor([2.0, 1.0, -1.0, -0.5], requires_grad=True)
    loss, numbers = Ranking()(Outputs(scores=scores), [pair(3.0), pair()])
    assert loss.tolist() == pytest.approx([0.313262, 0.974077], abs=1e-6)
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "accuracy": [1.0, 0.0],
        "margin": [1.0, -0.5],
        "mean_reward": [1.5, -0.75],
        "min_reward": [1.0, -1.0],
        "max_reward": [2.0, -0.5],
    }
    assert not any(values.requires_grad for values in numbers.values())
    # dL/dchosen = -sigma(-1) and -sigma(0.5).
    loss.sum().backward()
    assert scores.grad.tolist() == pytest.approx([-0.268941, 0.268941, -0.622459, 0.622459], abs=1e-6)


def test_a_rating_asks_for_a_margin() -> None:
    # Half of 3: 1 - 1.5 = -0.5. A pair without margin asks for none.
    scores = torch.tensor([2.0, 1.0, -1.0, -0.5])
    loss, numbers = Ranking(margin_scale=0.5)(Outputs(scores=scores), [pair(3.0), pair()])
    assert loss.tolist() == pytest.approx([0.974077, 0.974077], abs=1e-6)
    assert numbers["margin"].tolist() == [1.0, -0.5]


def test_centring_adds_the_squared_sum() -> None:
    # Sums 3 and -1.5 on top of 0.313262 and 0.974077: 0.1 * 9 and 0.1 * 2.25.
    scores = torch.tensor([2.0, 1.0, -1.0, -0.5], requires_grad=True)
    loss, numbers = Ranking(centring=0.1)(Outputs(scores=scores), [pair(), pair()])
    assert loss.tolist() == pytest.approx([1.213262, 1.199077], abs=1e-6)
    assert numbers["margin"].tolist() == [1.0, -0.5]
    # Both rewards of a pair are drawn alike, by 2 * 0.1 * their sum.
    loss.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.331059, 0.868941, -0.922459, 0.322459], abs=1e-6)


def test_equal_rewards_prefer_neither() -> None:
    _, numbers = Ranking()(Outputs(scores=torch.tensor([1.0, 1.0])), [pair()])
    assert numbers["accuracy"].tolist() == [0.5]


def reward_model(directory: str, budget: int = 4096) -> Learner:
    fixed = {"model": directory, "dtype": "float32", "device": "cpu", "lora": False, "lr": 1e-2}
    cfg = LearnerConfig.model_validate({**fixed, "micro_batch_tokens": budget})
    return Learner.load(cfg, total_steps=50, head="scalar")


def pairs_of(learner: Learner) -> list[Pair]:
    texts = [("good", "bad"), ("good one, truly", "bad one"), ("so good", "so bad, so very bad")]
    codec = learner.model.codec
    return [codec.pair(Comparison(Prompt("Q" * i), *both, margin=i / 2)) for i, both in enumerate(texts)]


def test_ranking_in_micro_batches(tiny: str, micro_batches_change_nothing: Callable[..., None]) -> None:
    micro_batches_change_nothing(lambda budget: reward_model(tiny, budget), pairs_of, Ranking(1.0))


def test_a_reward_model_learns_an_order(tiny: str, tmp_path: Path) -> None:
    learner = reward_model(tiny)
    pairs = pairs_of(learner)
    first = learner.update(pairs, Ranking())
    for _ in range(15):
        learner.update(pairs, Ranking())
    last = learner.measure(pairs, Ranking())
    assert last["loss"] < min(first["loss"], 0.1)
    assert last["accuracy"] == 1.0
    assert last["min_reward"] < last["mean_reward"] < last["max_reward"]
