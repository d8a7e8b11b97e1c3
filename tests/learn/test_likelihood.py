from collections.abc import Callable, Sequence

import pytest
import torch

from palate.learn import Likelihood, Needs, Pairwise, Policy
from palate.learn.likelihood import Anchored, anchors
from palate.losses import PAIR_LOSSES
from palate.model import Outputs, TokenValues, ragged
from palate.types import AnchoredPair, Completion, Demonstration, Example, Pair, Prompt

MakePolicy = Callable[..., Policy]
WAYS = pytest.mark.parametrize("fast", [True, False], ids=["fast", "plain"])


def outputs(rows: list[list[float]], ref: list[list[float]] | None = None) -> Outputs:
    logps = ragged([torch.tensor(row) for row in rows])
    return Outputs(
        logps=TokenValues(logps.values.requires_grad_(), logps.mask),
        ref_logps=None if ref is None else ragged([torch.tensor(row) for row in ref]),
    )


def slopes_of(made: Outputs) -> list[list[float]]:
    """Gradient by the log-probability of every token; what stands on padding is no token's."""
    return [row.tolist() for row in TokenValues(made.logps.values.grad, made.logps.mask).rows()]


def completion(size: int, first: int = 0) -> Completion:
    return Completion("", tuple(range(first, first + size)))


def example(size: int) -> Example:
    return Example(Prompt("Q"), completion(size))


def examples_of(policy: Policy) -> list[Example]:
    texts = ["Hello there, you!", "", "yes", "something much longer than the others"]
    return [policy.model.codec.example(Demonstration(Prompt("Q" * i), t)) for i, t in enumerate(texts)]


# ---- Likelihood ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "losses", "slopes"),
    [
        # Three tokens at -1, -2, -0.5 and one at -4.
        (Likelihood(), [3.5 / 3, 4.0], [-1 / 3, -1.0]),
        (Likelihood("sum"), [3.5, 4.0], [-1.0, -1.0]),
        (Likelihood("sum", divisor=4.0), [0.875, 1.0], [-0.25, -0.25]),
        # Two tokens a completion: (3.5 / 2 + 4 / 2) / 2 = 7.5 / 4, the mean over the four tokens.
        (Likelihood.per_token([example(3), example(1)]), [1.75, 2.0], [-0.5, -0.5]),
    ],
    ids=["mean", "sum", "divided", "per token"],
)
def test_likelihood_by_hand(objective: Likelihood, losses: list[float], slopes: list[float]) -> None:
    made = outputs([[-1.0, -2.0, -0.5], [-4.0]])
    loss, numbers = objective(made, [example(3), example(1)])
    assert loss.tolist() == pytest.approx(losses)
    assert numbers["logps/completion"].tolist() == [-3.5, -4.0]
    assert not numbers["logps/completion"].requires_grad
    loss.sum().backward()
    assert slopes_of(made) == [pytest.approx([slopes[0]] * 3), pytest.approx([slopes[1]])]


@WAYS
def test_likelihood_per_token_is_the_mean_over_all_tokens(make_policy: MakePolicy, fast: bool) -> None:
    policy = make_policy(model={"fast": fast}, micro_batch_tokens=60)
    records = examples_of(policy)
    logps = policy.logps(records)
    metrics = policy.update(records, Likelihood.per_token(records))
    assert metrics["loss"] == pytest.approx(-float(logps.values.sum() / logps.mask.sum()), rel=1e-5)
    assert metrics["logps/completion"] == pytest.approx(float(logps.sum().mean()), rel=1e-5)
    assert 0 <= metrics["mean_token_accuracy"] <= 1


@WAYS
@pytest.mark.parametrize("reduce", ["sum", "mean", "per token"])
def test_likelihood_in_micro_batches(
    make_policy: MakePolicy, micro_batches_change_nothing: Callable[..., None], reduce: str, fast: bool
) -> None:
    def make(budget: int) -> Policy:
        return make_policy(model={"fast": fast}, micro_batch_tokens=budget)

    per_token = reduce == "per token"
    objective = Likelihood.per_token(examples_of(make(1))) if per_token else Likelihood(reduce)
    micro_batches_change_nothing(make, examples_of, objective)


@WAYS
def test_a_label_of_one_token_is_learnt(make_policy: MakePolicy, fast: bool) -> None:
    # A ranker that says which of two is better: one token after the prompt.
    policy = make_policy(model={"fast": fast}, lr=1e-2)
    labels = {text: Completion(text, (ord(text),)) for text in "AB"}
    records = [Example(Prompt(f"{text * 3}?"), labels[text]) for text in "AB"]
    before = []
    for record in records:
        ids = torch.tensor([policy.model.codec.prompt_ids(record.prompt)])
        with torch.no_grad():
            table = policy.model.network(ids).logits[0, -1].log_softmax(-1)
        before.append(-float(table[record.completion.token_ids[0]]))
    first = policy.update(records, Likelihood())
    assert first["loss"] == pytest.approx(sum(before) / 2, rel=1e-5)
    assert first["num_tokens"] == 2
    for _ in range(25):
        last = policy.update(records, Likelihood())
    assert last["loss"] < 0.1
    assert last["mean_token_accuracy"] == 1.0


# ---- Anchored --------------------------------------------------------------------------------------

CHOSEN, REJECTED, ANCHOR = completion(2), completion(1, 4), completion(3, 7)
PAIR = Pair(Prompt("Q"), CHOSEN, REJECTED)
WITH_ANCHOR = AnchoredPair(PAIR, ANCHOR)
# Chosen -3, rejected -4, anchor -6; then a pair that is its own anchor: chosen -1, rejected -1.5.
ROWS = [[-1.0, -2.0], [-4.0], [-1.0, -2.0, -3.0], [-0.5, -0.5], [-1.5]]


def test_an_anchored_pair_has_three_completions() -> None:
    assert WITH_ANCHOR.prompt == Prompt("Q")
    assert WITH_ANCHOR.completions == (CHOSEN, REJECTED, ANCHOR)
    assert anchors([WITH_ANCHOR, PAIR]) == [Example(Prompt("Q"), ANCHOR), Example(Prompt("Q"), CHOSEN)]


def test_anchored_by_hand() -> None:
    # slic_rank with delta 2: max(0, 2 - (-3 + 4)) = 1 and max(0, 2 - (-1 + 1.5)) = 1.5.
    # Weights 3 and 0.5: 3 x 1 + 0.5 x 6 = 6 and 3 x 1.5 + 0.5 x 1 = 5.
    objective = Anchored(Pairwise(PAIR_LOSSES["slic_rank"], 2.0), pair_weight=3.0, anchor_weight=0.5)
    made = outputs(ROWS)
    loss, numbers = objective(made, [WITH_ANCHOR, PAIR])
    assert loss.tolist() == [6.0, 5.0]
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "rewards/chosen": [-3.0, -1.0],  # delta is a margin, by which nothing is multiplied
        "rewards/rejected": [-4.0, -1.5],
        "rewards/margins": [1.0, 0.5],
        "rewards/accuracies": [1.0, 1.0],
        "logps/chosen": [-3.0, -1.0],
        "logps/rejected": [-4.0, -1.5],
        "logps/anchor": [-6.0, -1.0],
        "rank_loss": [1.0, 1.5],
        "nll_loss": [6.0, 1.0],
    }
    assert not any(values.requires_grad for values in numbers.values())
    # -3 for a chosen token, +3 for a rejected one, -0.5 for an anchor's; the last pair's chosen is both.
    loss.sum().backward()
    assert slopes_of(made) == [[-3, -3], [3], [-0.5] * 3, [-3.5, -3.5], [3]]


def test_the_anchor_may_count_per_token() -> None:
    objective = Anchored(Pairwise(PAIR_LOSSES["slic_rank"], 2.0), Likelihood("mean"))
    loss, numbers = objective(outputs(ROWS), [WITH_ANCHOR, PAIR])
    assert loss.tolist() == [1 + 2.0, 1.5 + 0.5]
    # All anchor tokens of the update alike: (6 + 1) / 5 is the mean of what the two records have.
    all_alike = Likelihood.per_token(anchors([WITH_ANCHOR, PAIR]))
    _, numbers = Anchored(objective.pairwise, all_alike)(outputs(ROWS), [WITH_ANCHOR, PAIR])
    assert float(numbers["nll_loss"].mean()) == pytest.approx(7 / 5)


class Fixed:
    """A reference that is asked for nothing."""

    def logps(self, records: Sequence[object]) -> TokenValues:
        raise AssertionError


def test_the_pairs_reference_is_the_pairs() -> None:
    ref = Fixed()
    objective = Anchored(Pairwise(PAIR_LOSSES["dpo"], 0.5, ref))
    assert objective.needs == Needs(ref=ref)
    # Reference of the pairs -2, -4 and -2, -2; the anchor's is not looked at. beta h = 0.5 (-3 + 2 - 0) and
    # 0.5 (-1 + 2 - (-1.5 + 2)), -0.5 and 0.25: log(1 + e^0.5) = 0.974077, log(1 + e^-0.25) = 0.575939.
    reference = [[-1.0, -1.0], [-4.0], [9.0, 9.0, 9.0], [-1.0, -1.0], [-2.0]]
    _, numbers = objective(outputs(ROWS, reference), [WITH_ANCHOR, PAIR])
    assert numbers["rank_loss"].tolist() == pytest.approx([0.974077, 0.575939], abs=1e-6)


def anchored_of(policy: Policy) -> list[Pair | AnchoredPair]:
    codec = policy.model.codec
    made: list[Pair | AnchoredPair] = []
    for i, (chosen, rejected, anchor) in enumerate(
        [("Hello there", "no", "a target"), ("yes", "b", ""), ("c", "something longer", None)]
    ):
        prompt = Prompt("Q" * i)
        pair = Pair(prompt, codec.completion(prompt, chosen), codec.completion(prompt, rejected))
        made.append(pair if anchor is None else AnchoredPair(pair, codec.completion(prompt, anchor)))
    return made


SLIC = Anchored(Pairwise(PAIR_LOSSES["slic_rank"], 50.0), anchor_weight=0.5)


@WAYS
def test_anchored_pairs_in_micro_batches(
    make_policy: MakePolicy, micro_batches_change_nothing: Callable[..., None], fast: bool
) -> None:
    def make(budget: int) -> Policy:
        return make_policy(model={"fast": fast}, micro_batch_tokens=budget)

    micro_batches_change_nothing(make, anchored_of, SLIC)


def test_anchored_pairs_are_learnt(make_policy: MakePolicy) -> None:
    policy = make_policy(lr=3e-3)
    found = [policy.update(anchored_of(policy), SLIC) for _ in range(8)]
    assert found[-1]["loss"] < found[0]["loss"] - 5
    assert found[-1]["rewards/margins"] > found[0]["rewards/margins"]
    assert found[-1]["nll_loss"] < found[0]["nll_loss"]
