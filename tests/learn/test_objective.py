import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from palate.config import Sampling
from palate.journal import Journal
from palate.learn import CachedReference, Pairwise, Policy
from palate.losses import PAIR_LOSSES, PairLoss
from palate.model import LoadedModel, Outputs, Snapshot, TokenValues, ragged, snapshot
from palate.types import Comparison, Completion, Example, Group, Pair, Prompt, Record

# Two pairs, the tokens' log-probabilities of chosen and rejected.
LOGPS = [[-1.0, -2.0, -0.5], [-4.0], [-0.25], [-3.0, -1.0]]
REF = [[-1.5, -2.0, -1.0], [-3.0], [-0.25], [-2.0, -2.5]]
# Sums: policy -3.5, -4, -0.25, -4; reference -4.5, -3, -0.25, -4.5.
# Margins h: (1) - (-1) = 2 and (0) - (0.5) = -0.5.


def pair(version: int | None = None, **of_rejected) -> Pair:
    chosen = Completion("a", (1, 2, 3), policy_version=version)
    rejected = Completion("b", (4,), **{"policy_version": version} | of_rejected)
    return Pair(Prompt("Q"), chosen, rejected)


def outputs(*, ref: bool = True, version: int | None = None) -> Outputs:
    logps = ragged([torch.tensor(row) for row in LOGPS])
    logps = TokenValues(logps.values.requires_grad_(), logps.mask)
    known = ragged([torch.tensor(row) for row in REF]) if ref else None
    return Outputs(logps=logps, ref_logps=known, version=version)


def first_and_second(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Not a loss: shows what a loss is given."""
    return beta * (chosen + 100 * rejected)


# ---- Pairwise --------------------------------------------------------------------------------------


def test_dpo_by_hand() -> None:
    # beta = 0.5: beta h = 1 and -0.25. L = log(1 + e^-1) = 0.313262 and log(1 + e^0.25) = 0.825939.
    made = outputs()
    loss, numbers = Pairwise(PAIR_LOSSES["dpo"], strength=0.5)(made, [pair(), pair()])
    assert loss.tolist() == pytest.approx([0.313262, 0.825939], abs=1e-6)
    assert {name: values.tolist() for name, values in numbers.items()} == {
        "rewards/chosen": [0.5, 0.0],
        "rewards/rejected": [-0.5, 0.25],
        "rewards/margins": [1.0, -0.25],
        "rewards/accuracies": [1.0, 0.0],
        "logps/chosen": [-3.5, -0.25],
        "logps/rejected": [-4.0, -4.0],
    }
    # Numbers are for reading; only the loss carries gradient.
    assert loss.requires_grad
    assert not any(values.requires_grad for values in numbers.values())
    # dL/dchosen = -beta sigma(-beta h) = -0.5 x 0.268941 and -0.5 x 0.562177, the same for every token.
    loss.sum().backward()
    gradient = made.logps.values.grad
    assert gradient[0, :3].tolist() == pytest.approx([-0.134471] * 3, abs=1e-6)
    assert gradient[1, 0].item() == pytest.approx(0.134471, abs=1e-6)
    assert gradient[2, 0].item() == pytest.approx(-0.281088, abs=1e-6)
    assert gradient[3, :2].tolist() == pytest.approx([0.281088] * 2, abs=1e-6)


def test_a_margin_of_zero_prefers_neither() -> None:
    made = outputs()
    same = Outputs(logps=made.logps, ref_logps=made.logps)
    _, numbers = Pairwise(PAIR_LOSSES["dpo"], strength=0.5)(same, [pair(), pair()])
    assert numbers["rewards/accuracies"].tolist() == [0.5, 0.5]


def test_a_loss_without_reference() -> None:
    # slic_rank: max(0, delta - (chosen - rejected)), differences 0.5 and 3.75, delta = 2.
    objective = Pairwise(PAIR_LOSSES["slic_rank"], strength=2.0)
    loss, numbers = objective(outputs(ref=False), [pair(1), pair(1)])
    assert loss.tolist() == [1.5, 0.0]
    assert numbers["rewards/chosen"].tolist() == [-3.5, -0.25]  # delta is a margin, no factor
    assert numbers["rewards/margins"].tolist() == [0.5, 3.75]
    assert "objective/kl" not in numbers
    assert not any(values.requires_grad for values in numbers.values())
    # With one it is measured against it, and the loss stays.
    measured, more = objective(outputs(version=1), [pair(1), pair(1)])
    assert torch.equal(measured, loss)
    assert more["rewards/chosen"].tolist() == [1.0, 0.0]
    assert "objective/kl" in more


def test_a_loss_that_needs_a_reference_says_so() -> None:
    with pytest.raises(ValueError, match="dpo needs the reference"):
        Pairwise(PAIR_LOSSES["dpo"], strength=0.5)(outputs(ref=False), [pair(), pair()])


@pytest.mark.parametrize(
    ("reduce", "chosen", "rejected"),
    [("sum", [-3.5, -0.25], [-4.0, -4.0]), ("mean", [-3.5 / 3, -0.25], [-4.0, -2.0])],
)
def test_the_loss_says_how_tokens_are_reduced(reduce: str, chosen: list, rejected: list) -> None:
    loss = PairLoss(first_and_second, strength="beta", needs_ref=False, reduce=reduce)
    got, numbers = Pairwise(loss, strength=2.0)(outputs(), [pair(), pair()])
    expected = [2 * (c + 100 * r) for c, r in zip(chosen, rejected, strict=True)]
    assert got.tolist() == pytest.approx(expected)
    assert numbers["logps/chosen"].tolist() == pytest.approx(chosen)
    ref = {"sum": [-4.5, -0.25], "mean": [-1.5, -0.25]}[reduce]
    rewards = [2 * (c - r) for c, r in zip(chosen, ref, strict=True)]
    assert numbers["rewards/chosen"].tolist() == pytest.approx(rewards)


def test_options_reach_the_loss() -> None:
    smooth, _ = Pairwise(PAIR_LOSSES["dpo"], strength=0.5, options={"label_smoothing": 0.1})(
        outputs(), [pair(), pair()]
    )
    # 0.9 log(1 + e^-1) + 0.1 log(1 + e^1) = 0.313262 + 0.1 x 1.
    assert smooth[0].item() == pytest.approx(0.413262, abs=1e-6)


def test_kl_is_measured_on_samples_of_the_policy_as_it_is() -> None:
    # Mean over the two completions of log(policy / reference): (1 - 1) / 2 and (0 + 0.5) / 2. Sums, whatever
    # the loss reduces to: KL is in nats per completion.
    mean = PairLoss(first_and_second, strength="beta", needs_ref=False, reduce="mean")
    for loss in (PAIR_LOSSES["dpo"], mean):
        objective = Pairwise(loss, strength=0.5)
        now = outputs(version=3)
        assert objective(now, [pair(3), pair(3)])[1]["objective/kl"].tolist() == [0.0, 0.25]
        # Texts from data say nothing about where the policy goes; nor does a pair that is half from data, nor
        # what an earlier policy said: drawn from the reference, the log-ratio has the other sign.
        for other in (pair(), pair(3, policy_version=None), pair(2), pair(3, policy_version=2)):
            assert "objective/kl" not in objective(now, [other, other])[1]
            kl = objective(now, [other, pair(3)])[1]["objective/kl"]
            assert kl.isnan().tolist() == [True, False]
        assert "objective/kl" not in objective(outputs(), [pair(3), pair(3)])[1]  # only measured


# ---- CachedReference -------------------------------------------------------------------------------


class Counted:
    """A snapshot that notes what it is asked for."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.asked: list[tuple[Prompt, Completion]] = []
        self.has_memory = snapshot.has_memory

    def logps(self, records: Sequence[Record], *, kept: bool = False) -> TokenValues:
        self.asked += [(r.prompt, c) for r in records for c in r.completions]
        return self.snapshot.logps(records, kept=kept)


@pytest.fixture
def policy(make_policy: Callable[..., Policy]) -> Policy:
    return make_policy()


def rows(policy: Policy) -> list[Pair]:
    texts = [("Hello there", "no"), ("yes", "a longer one"), ("", "b")]
    codec = policy.model.codec
    return [codec.pair(Comparison(Prompt(f"Q{i}"), *both)) for i, both in enumerate(texts)]


def test_a_cached_reference_gives_the_snapshots_numbers_and_asks_once(policy: Policy) -> None:
    counted = Counted(policy.snapshot())
    cached = CachedReference(counted)
    pairs = rows(policy)
    expected = policy.snapshot().logps(pairs)
    for _ in range(3):
        got = cached.logps(pairs)
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.mask, expected.mask)
    assert len(counted.asked) == len(set(counted.asked)) == 6
    # Another order, or some of them, as shuffled epochs bring, asks no more.
    turned = cached.logps(pairs[::-1])
    for row, other in zip(turned.rows(), policy.snapshot().logps(pairs[::-1]).rows(), strict=True):
        torch.testing.assert_close(row, other, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat(cached.logps(pairs[1:2]).rows()), torch.cat(expected.rows()[2:4]))
    assert len(counted.asked) == 6


def test_a_cached_reference_keeps_no_records(policy: Policy) -> None:
    # Of a million pairs, the completions with their tokens would fill the memory.
    cached, pairs = CachedReference(policy.snapshot()), rows(policy)
    cached.logps(pairs)
    completions = [weakref.ref(c) for pair in pairs for c in pair.completions]
    del pairs
    gc.collect()
    assert [made() for made in completions] == [None] * 6


def test_in_a_run_a_cached_reference_reads_the_journal(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, pairs = CachedReference(policy.snapshot()), rows(policy)
    policy.memory = Journal(":memory:")
    passes: list[int] = []
    compute = snapshot.batched_logps

    def counted(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
        passes.append(len(records))
        return compute(model, records, budget)

    monkeypatch.setattr(snapshot, "batched_logps", counted)
    expected = policy.snapshot().logps(pairs)
    for _ in range(2):
        assert torch.equal(cached.logps(pairs).values, expected.values)
    assert passes == [3, 3]  # what is expected, and once for the reference
    # It keeps nothing itself: with another journal it computes again.
    policy.memory = Journal(":memory:")
    assert torch.equal(cached.logps(pairs).values, expected.values)
    assert passes == [3, 3, 3]


def test_a_completion_is_cached_with_its_prompt(policy: Policy) -> None:
    completion = policy.model.codec.completion(Prompt("Q"), "yes")
    one, other = Example(Prompt("Q"), completion), Example(Prompt("Something else"), completion)
    cached = CachedReference(policy.snapshot())
    first, second = cached.logps([one]), cached.logps([other])
    assert not torch.equal(first.values, second.values)
    assert torch.equal(second.values, policy.snapshot().logps([other]).values)
    # A row of data may have other tokens before the completion than sampling starts from.
    ids = (*policy.model.codec.prompt_ids(Prompt("Q")), 1)
    row = Example(Prompt("Q", token_ids=ids), completion)
    assert torch.equal(cached.logps([row]).values, policy.snapshot().logps([row]).values)


def test_a_cached_reference_stays_when_the_policy_moves(policy: Policy) -> None:
    pairs = rows(policy)
    cached = CachedReference(policy.snapshot())
    before = policy.snapshot().logps(pairs)
    objective = Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=cached)
    for _ in range(2):
        policy.update(pairs[:2], objective)
    # The third pair is met for the first time only now.
    for row, other in zip(cached.logps(pairs).rows(), before.rows(), strict=True):
        torch.testing.assert_close(row, other, atol=1e-5, rtol=0)
    assert float((policy.snapshot().logps(pairs).values - before.values).abs().max()) > 0.1


def test_cached_and_plain_reference_train_alike(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    trained = []
    for wrap in (CachedReference, lambda snapshot: snapshot):
        policy = make_policy()
        objective = Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=wrap(policy.snapshot()))
        losses = [policy.update(rows(policy), objective)["loss"] for _ in range(3)]
        trained.append((losses, policy.snapshot().logps(rows(policy)).values))
    assert trained[0][0] == trained[1][0]
    assert torch.equal(trained[0][1], trained[1][1])


def test_samples_are_cached_too(policy: Policy) -> None:
    (group,) = policy.snapshot().sample([Prompt("Q")], 3, Sampling(max_new_tokens=5), seed=0)
    assert isinstance(group, Group)
    counted = Counted(policy.snapshot())
    cached = CachedReference(counted)
    assert torch.equal(cached.logps([group]).values, cached.logps([group]).values)
    assert len(counted.asked) == 3
