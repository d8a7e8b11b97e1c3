import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from palate.learn import Needs, PairwiseCringe, Policy
from palate.learn.cringe import contrast_logits
from palate.model import Outputs, TokenValues, ragged
from palate.types import Comparison, Completion, Pair, Prompt

MakePolicy = Callable[..., Policy]
WAYS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])

# ---- contrast_logits -------------------------------------------------------------------------------


def test_contrast_by_hand() -> None:
    # k = 2, the three likeliest are 7, 3, 5 with logits log 6, log 3, log 1.
    logits = torch.tensor([6.0, 3.0, 1.0]).log().repeat(6, 1).requires_grad_()
    tokens = torch.tensor([[7, 3, 5]] * 6)
    # Negative 7 leaves 3 and 5 with 3/4 and 1/4; negative 3 leaves 7 and 5 with 6/7 and 1/7; negative 5, the
    # third, and 9, none of them, leave 7 and 3 with 2/3 and 1/3.
    negative = torch.tensor([7, 7, 3, 3, 5, 9])
    uniforms = torch.tensor([0.74, 0.76, 0.85, 0.86, 0.66, 0.67], dtype=torch.float64)
    found = contrast_logits(logits, tokens, negative, uniforms)
    assert found.exp().tolist() == pytest.approx([3, 1, 6, 1, 6, 3])
    found.sum().backward()
    picked = [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert logits.grad.tolist() == picked


@given(st.integers(1, 6), st.integers(0, 9), st.integers(0, 2**31), st.floats(0, 1, exclude_max=True))
@settings(max_examples=200, deadline=None)
def test_contrast_is_among_the_likeliest_and_never_the_token(
    k: int, negative: int, seed: int, uniform: float
) -> None:
    table = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed))
    top = table.topk(k + 1, dim=-1)
    found = contrast_logits(
        top.values, top.indices, torch.tensor([negative]), torch.tensor([uniform], dtype=torch.float64)
    )
    others = [float(logit) for i, logit in enumerate(table[0]) if i != negative]
    assert float(found) in sorted(others)[-k:]


def test_contrast_is_drawn_from_the_softmax() -> None:
    draws = 4000
    logits = torch.tensor([[1.5, 1.0, 0.2, -0.5]]).expand(draws, -1)
    tokens = torch.tensor([[4, 2, 8, 1]]).expand(draws, -1)
    uniforms = torch.from_numpy(np.random.Generator(np.random.Philox(key=3)).random(draws))
    found = contrast_logits(logits, tokens, torch.full((draws,), 2), uniforms)
    left = torch.tensor([1.5, 0.2, -0.5])
    counts = [int((found == logit).sum()) for logit in left]
    expected = (left.double().softmax(-1) * draws).numpy()
    assert sum(counts) == draws
    assert stats.chisquare(counts, expected * draws / expected.sum()).pvalue > 0.001


# ---- PairwiseCringe --------------------------------------------------------------------------------

PAIR = Pair(Prompt("Q"), Completion("", (1,)), Completion("", (2, 3)))
OBJECTIVE = PairwiseCringe(seed=0, k=1, b=0.0, tau=1.0, alpha=0.5)


def outputs() -> Outputs:
    """A chosen token of -0.5; rejected ones of -1 and -2, of which the first is the likeliest."""

    def values(rows: list[list[float]]) -> TokenValues:
        made = ragged([torch.tensor(row) for row in rows])
        return TokenValues(made.values.requires_grad_(), made.mask)

    top = [[[9.0, 8.0], [0.0, 0.0]], [[4.0, 1.0], [3.0, 2.5]]]
    return Outputs(
        logps=values([[-0.5], [-1.0, -2.0]]),
        target_logits=values([[9.0], [4.0, 1.0]]),
        top_logits=torch.tensor(top).requires_grad_(),
        top_tokens=torch.tensor([[[1, 0], [0, 0]], [[2, 5], [7, 8]]]),
    )


# With k = 1 the contrast is the likeliest other token: logit 1 to the first's 4, logit 3 to the second's 1.
# Cringe log(1 + e^3) = 3.048587 and log(1 + e^-2) = 0.126928, sum 3.175515; three tokens in all:
# L_bin = (0.5 + 0.5 x 3.175515) / 3 = 0.695919. M = -0.5 + 3 = 2.5, gate sigma(-2.5) = 0.075858.


def test_pairwise_cringe_by_hand() -> None:
    loss, numbers = OBJECTIVE(outputs(), [PAIR])
    assert OBJECTIVE.needs == Needs(top_logits=2)
    assert loss.tolist() == pytest.approx([0.075858 * 0.695919], abs=1e-6)
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "rewards/chosen": [-0.5],
        "rewards/rejected": [-3.0],
        "rewards/margins": [2.5],
        "rewards/accuracies": [1.0],
        "logps/chosen": [-0.5],
        "logps/rejected": [-3.0],
        "nll_loss": [0.5],
        "cringe_loss": pytest.approx([3.175515 / 2], abs=1e-6),
        "gate": pytest.approx([0.075858], abs=1e-6),
    }
    assert not any(values.requires_grad for values in numbers.values())


def test_gradient_of_pairwise_cringe_by_hand() -> None:
    # dCringe/ds = sigma(s - s*): sigma(3) = 0.952574, sigma(-2) = 0.119203; times 0.5 x 0.075858 / 3, that
    # is 0.012643. By log-probabilities: -g/3 for the chosen's, and through the gate -+ g (1 - g) L_bin =
    # 0.070103 x 0.695919 = 0.048786.
    made = outputs()
    OBJECTIVE(made, [PAIR])[0].sum().backward()
    logits = made.target_logits.values.grad
    assert logits[1].tolist() == pytest.approx([0.012043, 0.001507], abs=1e-6)
    top = made.top_logits.grad
    assert top[1, 0].tolist() == pytest.approx([0, -0.012043], abs=1e-6)
    assert top[1, 1].tolist() == pytest.approx([-0.001507, 0], abs=1e-6)
    assert (top[0] == 0).all()
    assert (logits[0] == 0).all()
    logps = made.logps.values.grad
    assert logps[0, 0].item() == pytest.approx(-0.025286 - 0.048786, abs=1e-6)
    assert logps[1].tolist() == pytest.approx([0.048786] * 2, abs=1e-6)


def test_gate_and_contrast_may_be_held_fixed() -> None:
    loss, _ = OBJECTIVE(outputs(), [PAIR])
    made = outputs()
    fixed, _ = replace(OBJECTIVE, detach_gate=True)(made, [PAIR])
    fixed.sum().backward()
    assert made.logps.values.grad[0, 0].item() == pytest.approx(-0.025286, abs=1e-6)
    assert (made.logps.values.grad[1] == 0).all()
    assert (made.top_logits.grad != 0).any()
    made = outputs()
    alone, _ = replace(OBJECTIVE, detach_contrast=True)(made, [PAIR])
    alone.sum().backward()
    assert made.top_logits.grad is None
    assert made.target_logits.values.grad[1, 0].item() == pytest.approx(0.012043, abs=1e-6)
    assert loss.tolist() == fixed.tolist() == alone.tolist()


def pairs_of(policy: Policy) -> list[Pair]:
    """Two pairs of one prompt among them."""
    texts = [("Hello there", "no, not at all"), ("yes", "b"), ("", "something longer"), ("c", "d")]
    codec = policy.model.codec
    return [codec.pair(Comparison(Prompt("Q" * (i // 2)), *both)) for i, both in enumerate(texts)]


SAMPLED = PairwiseCringe(seed=5, k=4, b=10.0, tau=10.0, alpha=1.0)


def losses_of(policy: Policy, records: list[Pair], objective: PairwiseCringe = SAMPLED) -> list[float]:
    with torch.no_grad(), policy.model.computing():
        found = policy.model.outputs(records, top_logits=objective.needs.top_logits)
        return objective(found, records)[0].tolist()


def test_what_is_drawn_depends_on_seed_and_pair_alone(make_policy: MakePolicy) -> None:
    policy = make_policy()
    records = pairs_of(policy)
    whole = losses_of(policy, records)
    assert losses_of(policy, records[::-1])[::-1] == pytest.approx(whole, rel=1e-5)
    assert [losses_of(policy, [record])[0] for record in records] == pytest.approx(whole, rel=1e-5)
    others = losses_of(policy, records, replace(SAMPLED, seed=6))
    assert max(abs(a - b) for a, b in zip(whole, others, strict=True)) > 1e-4
    assert losses_of(policy, records) == whole


def test_fast_and_plain_way_give_the_same_loss(make_policy: MakePolicy) -> None:
    fast, plain = (make_policy(model={"fast": way}) for way in (True, False))
    assert losses_of(fast, pairs_of(fast)) == pytest.approx(losses_of(plain, pairs_of(plain)), abs=1e-4)


def test_the_loss_against_plain_operations_on_all_logits(make_policy: MakePolicy) -> None:
    # k = 1, so that nothing is drawn: the contrast is the likeliest of all other tokens.
    policy = make_policy()
    objective = replace(SAMPLED, k=1, alpha=0.7)
    got = losses_of(policy, pairs_of(policy), objective)
    for loss, record in zip(got, pairs_of(policy), strict=True):
        prompt = policy.model.codec.prompt_ids(record.prompt)
        sums, cringe = [], 0.0
        for completion in record.completions:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logits = policy.model.network(ids).logits[0, len(prompt) - 1 : -1].double()
            target = ids[0, len(prompt) :, None]
            sums.append(float(logits.log_softmax(-1).gather(-1, target).sum()))
            own = logits.gather(-1, target)[:, 0]
            best = logits.scatter(-1, target, -math.inf).amax(-1)
            cringe = float(torch.log1p((own - best).exp()).sum())  # that of the rejected one stays
        count = sum(len(c.token_ids) for c in record.completions)
        gate = 1 / (1 + math.exp(-(10 - (sums[0] - sums[1])) / 10))
        assert loss == pytest.approx(gate * (-sums[0] + 0.7 * cringe) / count, rel=1e-4)


@WAYS
def test_pairwise_cringe_in_micro_batches(
    make_policy: MakePolicy, micro_batches_change_nothing: Callable[..., None], fast: bool
) -> None:
    def make(budget: int) -> Policy:
        return make_policy(model={"fast": fast}, micro_batch_tokens=budget)

    micro_batches_change_nothing(make, pairs_of, SAMPLED)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # asked by peft
def test_pairwise_cringe_is_learnt(make_policy: MakePolicy, lora: bool) -> None:
    policy = make_policy(lr=1e-2, model={"lora": lora})
    found = [policy.update(pairs_of(policy), replace(SAMPLED, seed=step)) for step in range(15)]
    assert found[-1]["loss"] < 0.8 * found[0]["loss"]
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]
    assert found[-1]["nll_loss"] < found[0]["nll_loss"]
    assert found[-1]["cringe_loss"] < found[0]["cringe_loss"]
