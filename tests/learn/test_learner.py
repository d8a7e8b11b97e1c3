import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import fmean, median
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from palate.config import LearnerConfig, Sampling
from palate.errors import NonFiniteError, RunError
from palate.learn import CachedReference, Learner, Needs, Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.losses.reward import bradley_terry
from palate.losses.token import nll
from palate.model import Outputs, TokenValues, lm_outputs, ragged, scalar_outputs
from palate.types import Comparison, Completion, Demonstration, Example, Pair, Prompt, Record

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

LORA, FULL = {"lora": True, "lora_rank": 4}, {"lora": False}
BOTH = pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
PLAIN = {"fast": False}
ALL_WAYS = pytest.mark.parametrize(
    "model",
    [LORA, FULL, {**LORA, **PLAIN}, {**FULL, **PLAIN}],
    ids=["lora", "full", "plain lora", "plain full"],
)
FAST_AND_PLAIN = pytest.mark.parametrize("model", [FULL, {**FULL, **PLAIN}], ids=["fast", "plain"])
ALL_TOKENS = 100_000

MakePolicy = Callable[..., Policy]


def pairs_of(learner: Learner) -> list[Pair]:
    texts = [
        ("Hello there, you!", "no"),
        ("yes", "something much longer"),
        ("", "a"),
        ("b", "c"),
        ("d e f", ""),
    ]
    codec = learner.model.codec
    return [codec.pair(Comparison(Prompt("Q" * 3 * i), *both)) for i, both in enumerate(texts)]


def examples_of(learner: Learner) -> list[Example]:
    return [Example(p.prompt, c) for p in pairs_of(learner) for c in p.completions]


@dataclass(frozen=True)
class Imitate:
    """Negative log-likelihood, and what a custom objective may want to see."""

    needs: ClassVar[Needs] = Needs()
    met: list[tuple[Outputs, list[Example]]] = field(default_factory=list)
    scale: float = 1.0

    def __call__(self, outputs: Outputs, records: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        self.met.append((outputs, list(records)))
        loss = self.scale * nll(outputs.logps.sum())
        return loss, {"length": torch.tensor([float(len(r.completion.token_ids)) for r in records])}


@dataclass(frozen=True)
class Noting:
    """Another objective, with a note of the micro-batches that it is given."""

    inner: Pairwise
    met: list[list[Pair]] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return self.inner.needs

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        self.met.append(list(records))
        return self.inner(outputs, records)


@dataclass(frozen=True)
class RewardPairs:
    """Bradley-Terry on a scalar head."""

    needs: ClassVar[Needs] = Needs(head="scalar")

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = outputs.scores.view(-1, 2).unbind(-1)
        return bradley_terry(chosen, rejected), {"accuracy": (chosen > rejected).float()}


class BrokenError(RuntimeError):
    pass


@dataclass
class Fails:
    """Works for the first micro-batches and then raises."""

    good: int
    needs: ClassVar[Needs] = Needs()

    def __call__(self, outputs: Outputs, records: Sequence[Record]) -> tuple[Tensor, dict[str, Tensor]]:
        self.good -= 1
        if self.good < 0:
            raise BrokenError
        return -outputs.logps.sum().view(len(records), -1).sum(-1), {}


def dpo(policy: Policy, *, cached: bool = False) -> Pairwise:
    ref = policy.snapshot()
    return Pairwise(PAIR_LOSSES["dpo"], strength=0.5, ref=CachedReference(ref) if cached else ref)


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.model.network.state_dict().items()}


def same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(v, others[k]) for k, v in some.items())


def stir(policy: Policy) -> None:
    """Moves the trained weights off their start, where half of an adapter's gradient is zero."""
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, parameter in policy.model.trained():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))


def gradients(
    policy: Policy, records: Sequence[Record], objective, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Tensor]:
    """What an update would apply."""
    found: dict[str, Tensor] = {}

    def step() -> float:
        names = [name for name, _ in policy.model.trained()]
        found.update(
            {n: g.clone() for n, g in zip(names, policy.optimizer.gradients(), strict=True) if g is not None}
        )
        policy.optimizer.drop_gradients()
        return 0.0

    with monkeypatch.context() as patch:
        patch.setattr(policy.optimizer, "step", step)
        policy.update(records, objective)
    assert found
    return found


# ---- gradients -------------------------------------------------------------------------------------


@ALL_WAYS
def test_gradients_do_not_depend_on_micro_batches(
    make_policy: MakePolicy,
    model: dict,
    monkeypatch: pytest.MonkeyPatch,
    same_gradients: Callable[..., None],
) -> None:
    found, counts = [], []
    for budget in (1, 120, ALL_TOKENS):
        policy = make_policy(model=model, micro_batch_tokens=budget)
        ref = CachedReference(policy.snapshot())
        ref.logps(pairs_of(policy))
        stir(policy)
        objective = Noting(Pairwise(PAIR_LOSSES["dpo"], strength=0.5, ref=ref))
        found.append(gradients(policy, pairs_of(policy), objective, monkeypatch))
        counts.append(len(objective.met))
    assert counts[0] == 5
    assert 1 < counts[1] < 5
    assert counts[2] == 1
    same_gradients(found[0], found[2])
    same_gradients(found[1], found[2])


@FAST_AND_PLAIN
def test_gradient_is_that_of_the_mean_loss(
    make_policy: MakePolicy,
    model: dict,
    monkeypatch: pytest.MonkeyPatch,
    same_gradients: Callable[..., None],
) -> None:
    # Against autograd over unpadded rows, one at a time, in float64.
    policy = make_policy(model=model, micro_batch_tokens=60)
    records = examples_of(policy)
    got = gradients(policy, records, Imitate(), monkeypatch)
    exact = make_policy().model.network.double()
    total = torch.zeros((), dtype=torch.float64)
    for record in records:
        prompt = policy.model.codec.prompt_ids(record.prompt)
        ids = torch.tensor([[*prompt, *record.completion.token_ids]])
        logps = exact(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        total -= logps.gather(-1, ids[0, len(prompt) :, None]).sum()
    (total / len(records)).backward()
    expected = {name: p.grad.float() for name, p in exact.named_parameters()}
    same_gradients(got, expected)


@ALL_WAYS
def test_gradients_do_not_depend_on_activation_checkpointing(
    make_policy: MakePolicy,
    model: dict,
    monkeypatch: pytest.MonkeyPatch,
    same_gradients: Callable[..., None],
) -> None:
    found = []
    for checkpointing in (False, True):
        policy = make_policy(model={**model, "checkpointing": checkpointing})
        objective = dpo(policy, cached=True)
        objective.needs.ref.logps(pairs_of(policy))
        assert policy.model.network.is_activation_checkpointing == checkpointing
        stir(policy)
        found.append(gradients(policy, pairs_of(policy), objective, monkeypatch))
        assert not policy.model.network.training
    same_gradients(*found)


@FAST_AND_PLAIN
def test_activations_are_recomputed(make_policy: MakePolicy, model: dict) -> None:
    # Else checkpointing would change nothing at all, memory included.
    calls = []
    for checkpointing in (False, True):
        policy = make_policy(model={**model, "checkpointing": checkpointing})
        attention = policy.model.network.model.layers[0].self_attn
        seen: list[int] = []
        attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        policy.update(examples_of(policy), Imitate())
        calls.append(len(seen))
    assert calls == [1, 2]


def test_gradients_of_bfloat16_weights_add_up_in_float32(
    make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four records: dividing by four costs no bits, so that the sum is exactly that of the single updates'.
    policy = make_policy(model={"dtype": "bfloat16"}, micro_batch_tokens=1)
    records = pairs_of(policy)[1:]
    objective = Noting(Pairwise(PAIR_LOSSES["slic_rank"], strength=100.0))
    whole = gradients(policy, records, objective, monkeypatch)
    assert [len(met) for met in objective.met] == [1, 1, 1, 1]
    single = [gradients(policy, met, objective.inner, monkeypatch) for met in objective.met]
    for name, gradient in whole.items():
        assert gradient.dtype == torch.float32
        expected = sum((g[name] / 4 for g in single[1:]), start=single[0][name] / 4)
        torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-6)
    assert not all(torch.equal(g, g.bfloat16().float()) for g in whole.values())


# ---- updates ---------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_equal_runs_end_alike_to_the_last_bit(make_policy: MakePolicy, model: dict, dtype: str) -> None:
    def run() -> dict[str, Tensor]:
        policy = make_policy(model={**model, "dtype": dtype}, micro_batch_tokens=100)
        objective = dpo(policy)
        for _ in range(3):
            policy.update(pairs_of(policy), objective)
        return weights(policy)

    assert same(run(), run())


def test_small_updates_of_bfloat16_weights_add_up(make_policy: MakePolicy) -> None:
    policy = make_policy(model={"dtype": "bfloat16"}, lr=1e-5)
    start = weights(policy)
    objective = Imitate(scale=0.01)
    policy.update(examples_of(policy), objective)
    gain = "model.norm.weight"  # ones, next to which bfloat16 knows nothing closer than 1/256
    names = [name for name, _ in policy.model.trained()]
    master = policy.optimizer.master[names.index(gain)]
    assert torch.equal(weights(policy)[gain], start[gain])
    assert float((master.detach() - 1).abs().max()) == pytest.approx(1e-5, rel=0.05)
    # Not quite: some steps have to be seen at last.
    policy.optimizer.lr = 1e-3
    for _ in range(6):
        policy.update(examples_of(policy), objective)
        for live, kept in zip(policy.optimizer.live, policy.optimizer.master, strict=True):
            assert torch.equal(live, kept.bfloat16())
    assert not torch.equal(weights(policy)[gain], start[gain])


def test_grad_norm_is_that_before_clipping(make_policy: MakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(max_grad_norm=0.01)
    raw = gradients(policy, examples_of(policy), Imitate(), monkeypatch)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in raw.values()))
    assert norm > 1
    metrics = policy.update(examples_of(policy), Imitate())
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_learning_rate_is_that_of_the_step_it_is_reported_with(make_policy: MakePolicy) -> None:
    policy = make_policy(lr=0.02, schedule="cosine", warmup_steps=2, total_steps=6)
    found = [policy.update(examples_of(policy), Imitate())["learning_rate"] for _ in range(6)]
    cosine = [0.01 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert found == pytest.approx([0.01, 0.02, *cosine])


@dataclass(frozen=True)
class SteepTwist(Imitate):
    """A finite loss whose gradient is not."""

    def __call__(self, outputs: Outputs, records: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, numbers = super().__call__(outputs, records)
        zero = loss - loss.detach()
        return loss.detach() + zero.abs().sqrt(), numbers


BROKEN = [Imitate(scale=math.nan), Imitate(scale=math.inf), SteepTwist()]


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("broken", BROKEN, ids=["loss nan", "loss inf", "gradient"])
def test_an_update_that_is_not_finite_is_skipped_and_changes_nothing(
    make_policy: MakePolicy, model: dict, dtype: str, broken: Imitate
) -> None:
    options = {"model": {**model, **PLAIN, "dtype": dtype}, "micro_batch_tokens": 100}
    policy, undisturbed = (make_policy(**options, schedule="linear") for _ in range(2))
    for which in (policy, undisturbed):
        which.update(examples_of(which), Imitate())
    before, snapshot = weights(policy), policy.snapshot()
    logps = snapshot.logps(examples_of(policy)).values
    for count in (1, 2):
        metrics = policy.update(examples_of(policy), broken)
        assert metrics["skipped_updates"] == count
        assert all(map(math.isfinite, metrics.values()))
        assert not {"grad_norm", "learning_rate"} & metrics.keys()
    assert same(weights(policy), before)
    assert (policy.version, policy.optimizer.steps, policy.skipped_in_a_row) == (1, 1, 2)
    assert all(gradient is None for gradient in policy.optimizer.gradients())
    # Neither the moments nor the schedule have noticed, and the count goes on.
    one, other = (which.update(examples_of(which), Imitate()) for which in (policy, undisturbed))
    assert one == {**other, "skipped_updates": 2}
    assert same(weights(policy), weights(undisturbed))
    assert (policy.skipped, policy.skipped_in_a_row) == (2, 0)
    assert torch.equal(snapshot.logps(examples_of(policy)).values, logps)


@pytest.mark.parametrize("broken", BROKEN, ids=["loss nan", "loss inf", "gradient"])
def test_the_third_in_a_row_ends_it(make_policy: MakePolicy, broken: Imitate) -> None:
    policy = make_policy(model=PLAIN)
    for _ in range(2):  # one good one between, and the count begins anew
        policy.update(examples_of(policy), Imitate())
        policy.update(examples_of(policy), broken)
        policy.update(examples_of(policy), broken)
    before = weights(policy)
    what = "the gradient's norm is (nan|inf)" if isinstance(broken, SteepTwist) else "the loss is (nan|inf)"
    with pytest.raises(NonFiniteError, match=f"^{what} at update 3, the 3rd time in a row; the weights") as e:
        policy.update(examples_of(policy), broken)
    assert e.value.records == examples_of(policy)
    assert same(weights(policy), before)
    assert policy.skipped == 5
    sent = pickle.loads(pickle.dumps(e.value))
    assert (type(sent), str(sent), sent.records) == (NonFiniteError, str(e.value), e.value.records)


def test_one_bad_micro_batch_of_several_skips_the_whole_update(make_policy: MakePolicy) -> None:
    policy = make_policy(model=PLAIN, micro_batch_tokens=60)
    before = weights(policy)

    @dataclass(frozen=True)
    class Second(Imitate):
        def __call__(self, outputs: Outputs, records: Sequence[Example]) -> tuple[Tensor, dict[str, Tensor]]:
            loss, numbers = super().__call__(outputs, records)
            return loss * (math.nan if len(self.met) == 2 else 1.0), numbers

    assert policy.update(examples_of(policy), Second())["skipped_updates"] == 1
    assert same(weights(policy), before)
    assert all(gradient is None for gradient in policy.optimizer.gradients())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_that_fails_half_way_leaves_no_gradient_behind(make_policy: MakePolicy, dtype: str) -> None:
    # In a notebook: an interrupted update, then another one.
    policy, undisturbed = (make_policy(model={"dtype": dtype}, micro_batch_tokens=60) for _ in range(2))
    with pytest.raises(BrokenError):
        policy.update(examples_of(policy), Fails(good=2))
    assert not policy.model.network.training
    for which in (policy, undisturbed):
        which.update(examples_of(which), Imitate())
    assert same(weights(policy), weights(undisturbed))


def test_objectives_see_records_and_outputs_in_one_order(make_policy: MakePolicy) -> None:
    policy = make_policy(micro_batch_tokens=60)
    records = examples_of(policy)
    expected = dict(zip(map(key, records), policy.logps(records).rows(), strict=True))
    objective = Imitate()
    policy.update(records, objective)
    assert len(objective.met) > 2
    for outputs, met in objective.met:
        assert outputs.ref_logps is None
        for record, row in zip(met, outputs.logps.rows(), strict=True):
            torch.testing.assert_close(row.detach(), expected[key(record)], atol=1e-5, rtol=0)
    assert sorted(key(r) for _, met in objective.met for r in met) == sorted(map(key, records))


def key(record: Example) -> tuple:
    return (record.prompt.id, record.completion.token_ids)


def test_the_reference_is_asked_once_for_all_micro_batches(make_policy: MakePolicy) -> None:
    policy = make_policy(micro_batch_tokens=60)
    snapshot = policy.snapshot()
    asked: list[list[Record]] = []

    class Noted:
        def logps(self, records: Sequence[Record]) -> TokenValues:
            asked.append(list(records))
            return snapshot.logps(records)

    objective = Noting(Pairwise(PAIR_LOSSES["dpo"], strength=0.5, ref=Noted()))
    pairs = pairs_of(policy)
    policy.update(pairs, objective)
    assert asked == [pairs]  # once, for all micro-batches
    assert len(objective.met) > 1
    assert sum(map(len, asked)) == 5


# ---- metrics ---------------------------------------------------------------------------------------


@FAST_AND_PLAIN
@pytest.mark.parametrize("budget", [1, 60, ALL_TOKENS])
def test_metrics_are_means_over_records_and_tokens(make_policy: MakePolicy, model: dict, budget: int) -> None:
    policy = make_policy(model=model, micro_batch_tokens=budget)
    records = examples_of(policy)
    with torch.no_grad():
        outputs = lm_outputs(policy.model, records, statistics=True)
    lengths = [len(r.completion.token_ids) for r in records]
    metrics = policy.update(records, Imitate())
    assert metrics["loss"] == pytest.approx(
        -float(outputs.logps.values.double().sum()) / len(records), rel=1e-6
    )
    assert metrics["length"] == sum(lengths) / len(records)
    assert metrics["num_tokens"] == sum(lengths)
    # Over all tokens: a mean of completions' means would weigh short ones more.
    assert metrics["entropy"] == pytest.approx(float(outputs.entropy.values.sum()) / sum(lengths), rel=1e-6)
    accuracy = float(outputs.top1.values.sum()) / sum(lengths)
    assert metrics["mean_token_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    logps = float(outputs.logps.values.double().sum()) / sum(lengths)
    assert metrics["logps/training"] == pytest.approx(logps, rel=1e-6)
    assert set(metrics) == {
        *("loss", "length", "num_tokens", "entropy", "mean_token_accuracy", "logps/training"),
        *("grad_norm", "learning_rate"),
    }


@ALL_WAYS
def test_the_gap_between_sampler_and_learner(make_policy: MakePolicy, model: dict) -> None:
    policy = make_policy(model=model, micro_batch_tokens=60)
    policy.update(examples_of(policy), Imitate())  # so that version 0 means nothing special
    groups = policy.snapshot().sample(
        [Prompt("Hi"), Prompt("A longer one")], 2, Sampling(max_new_tokens=6, temperature=0.7), seed=0
    )
    pairs = [Pair(g.prompt, *g.completions) for g in groups]
    names = [f"sampling/sampling_logp_difference/{which}" for which in ("mean", "max")]
    # Shifted by hand on one side, for a gap that can be foretold: 0.005 on every token of two completions.
    shifted = [replace(p, chosen=shift(p.chosen, 0.005)) for p in pairs]
    objective = Pairwise(PAIR_LOSSES["slic_rank"], strength=1.0)
    first = policy.update(shifted, objective)
    counts = [len(c.token_ids) for p in pairs for c in (p.chosen, p.rejected)]
    expected = 0.005 * sum(counts[::2]) / sum(counts)
    assert first[names[0]] == pytest.approx(expected, abs=1e-5)
    assert first[names[1]] == pytest.approx(0.005, abs=1e-5)
    # A version later the difference is no error of the engine any more.
    stale = policy.update(pairs, objective)
    assert not set(names) & set(stale)
    # Mixed with fresh ones, stale completions do not count.
    (fresh,) = policy.snapshot().sample([Prompt("Hi")], 2, Sampling(max_new_tokens=6), seed=1)
    mixed = policy.update([*pairs, Pair(fresh.prompt, *fresh.completions)], objective)
    assert mixed[names[1]] < 1e-4
    assert mixed[names[0]] <= mixed[names[1]]
    # Nor is anything known of texts from data.
    assert not set(names) & set(policy.update(pairs_of(policy), objective))


def test_one_token_apart_is_enough_to_stop(make_policy: MakePolicy) -> None:
    policy = make_policy()
    (group,) = policy.snapshot().sample([Prompt("Hi")], 2, Sampling(max_new_tokens=6), seed=0)
    first, second = group.completions
    assert first.logps is not None
    apart = replace(first, logps=(first.logps[0] + 0.5, *first.logps[1:]))
    with pytest.raises(RunError, match=r"sampler and learner differ by 0\.5 nats"):
        policy.update([Pair(group.prompt, apart, second)], Pairwise(PAIR_LOSSES["slic_rank"], 1.0))


def test_in_float32_a_wide_gap_stops_before_anything_is_learnt(make_policy: MakePolicy) -> None:
    policy = make_policy()
    groups = policy.snapshot().sample([Prompt("Hi")], 2, Sampling(max_new_tokens=6), seed=0)
    before = [p.detach().clone() for _, p in policy.model.trained()]
    pairs = [Pair(g.prompt, shift(g.completions[0], 0.5), g.completions[1]) for g in groups]
    with pytest.raises(RunError, match=r"sampler and learner differ by 0\.5 nats"):
        policy.update(pairs, Pairwise(PAIR_LOSSES["slic_rank"], strength=1.0))
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, policy.model.trained(), strict=True))
    assert all(gradient is None for gradient in policy.optimizer.gradients())


def shift(completion: Completion, by: float) -> Completion:
    return replace(completion, logps=tuple(v + by for v in completion.logps))


def test_the_observer_is_told_of_tokens_and_of_the_step(make_policy: MakePolicy) -> None:
    policy = make_policy(micro_batch_tokens=60)
    told: list[tuple[str, int]] = []
    policy.observe = lambda *what: told.append(what)
    metrics = policy.update(examples_of(policy), Imitate())
    assert {stage for stage, _ in told} == {"learn"}
    assert sum(amount for _, amount in told) == metrics["num_tokens"]
    assert told[-1] == ("learn", 0)


# ---- measure ---------------------------------------------------------------------------------------


@BOTH
def test_measuring_changes_nothing(make_policy: MakePolicy, model: dict) -> None:
    policy = make_policy(model={**model, "checkpointing": True}, micro_batch_tokens=100)
    objective = dpo(policy, cached=True)
    policy.update(pairs_of(policy), objective)
    before = weights(policy)
    measured = policy.measure(pairs_of(policy), objective)
    assert same(weights(policy), before)
    assert policy.version == policy.optimizer.steps == 1
    assert all(g is None for g in policy.optimizer.gradients())
    assert not policy.model.network.training
    # The numbers of the update that would follow.
    updated = policy.update(pairs_of(policy), objective)
    intervals = {name for name in measured if name.endswith(("_low", "_high"))}  # only measurements have them
    assert {name: value for name, value in measured.items() if name not in intervals} == pytest.approx(
        {name: value for name, value in updated.items() if name in measured}, abs=1e-5
    )
    assert set(updated) - set(measured) == {"grad_norm", "learning_rate"}


def test_a_measurement_between_updates_does_not_count(make_policy: MakePolicy) -> None:
    watched, alone = make_policy(), make_policy()
    for policy in (watched, alone):
        for _ in range(2):
            policy.update(examples_of(policy), Imitate())
            if policy is watched:
                policy.measure(pairs_of(policy), dpo(policy))
    assert same(weights(watched), weights(alone))


# ---- records and objectives of a method's own --------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """A record that `palate.types` does not know, as a policy gradient has: numbers of each token."""

    prompt: Prompt
    completion: Completion
    advantages: tuple[float, ...]

    @property
    def completions(self) -> tuple[Completion]:
        return (self.completion,)


class WeighTokens:
    """-Σ_t advantage_t log π(token_t): reads more of a record than a learner does."""

    needs = Needs()

    def __call__(self, outputs: Outputs, records: Sequence[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
        weights = ragged([torch.tensor(record.advantages) for record in records])
        assert torch.equal(weights.mask, outputs.logps.mask)
        return -(weights.values * outputs.logps.values).sum(-1), {}


@FAST_AND_PLAIN
def test_any_class_with_a_prompt_and_completions_is_a_record(make_policy: MakePolicy, model: dict) -> None:
    by_token, whole = (make_policy(model=model, micro_batch_tokens=60) for _ in range(2))
    examples = examples_of(by_token)
    rollouts = [Rollout(e.prompt, e.completion, (0.5,) * len(e.completion.token_ids)) for e in examples]
    one, other = by_token.update(rollouts, WeighTokens()), whole.update(examples, Imitate(scale=0.5))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)
    before = weights(by_token)
    nothing = [replace(rollout, advantages=(0.0,) * len(rollout.advantages)) for rollout in rollouts]
    assert by_token.measure(nothing, WeighTokens())["loss"] == 0
    assert same(weights(by_token), before)


def test_an_objective_of_another_head_is_refused(tiny: str, make_policy: MakePolicy) -> None:
    policy, ranker = make_policy(), scalar_learner(tiny)
    with pytest.raises(AssertionError, match="RewardPairs reads head 'scalar', not 'lm'"):
        policy.update(pairs_of(policy), RewardPairs())
    with pytest.raises(AssertionError, match="Imitate reads head 'lm', not 'scalar'"):
        ranker.measure(examples_of(ranker), Imitate())


@pytest.mark.parametrize("name", ["", "Critic", "../critic", "critic.old", "2nd"])
def test_a_name_that_is_no_directorys_is_refused(tiny: str, name: str) -> None:
    with pytest.raises(AssertionError, match="cannot name a learner"):
        scalar_learner(tiny, name=name)


# ---- a scalar head ---------------------------------------------------------------------------------


def scalar_learner(tiny: str, *, name: str = "policy", **options) -> Learner:
    fixed = {"model": tiny, "dtype": "float32", "device": "cpu", "lr": 1e-2, "micro_batch_tokens": 100}
    cfg = LearnerConfig.model_validate(fixed | options)
    return Learner.load(cfg, total_steps=20, head="scalar", name=name)


@BOTH
def test_a_scalar_head_learns_preferences(tiny: str, model: dict) -> None:
    learner = scalar_learner(tiny, **model, lr=3e-3)
    history = [learner.update(pairs_of(learner), RewardPairs()) for _ in range(40)]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.1)
    # Now and then a step is too long and the loss jumps, on each processor elsewhere. A median ignores it.
    assert median(row["loss"] for row in history[-10:]) < math.log(2) / 2
    assert median(row["accuracy"] for row in history[-10:]) == 1.0
    # No tokens are predicted, so nothing is said of them.
    assert set(history[0]) == {"loss", "accuracy", "grad_norm", "learning_rate"}
    scores = learner.scores(pairs_of(learner)).view(-1, 2)
    ranked = (scores[:, 0] > scores[:, 1]).double().mean()
    assert learner.measure(pairs_of(learner), RewardPairs())["accuracy"] == pytest.approx(float(ranked))


def test_scores_come_in_the_records_order(tiny: str) -> None:
    learner = scalar_learner(tiny, lora=False)
    learner.update(pairs_of(learner), RewardPairs())
    records = [*pairs_of(learner), *examples_of(learner)[:3]]
    scores = learner.scores(records)
    assert scores.shape == (13,)
    with torch.no_grad():
        alone = torch.cat([scalar_outputs(learner.model, [r]).scores for r in records])
    torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
    assert len(set(alone[:10].tolist())) == 10


def test_imitation_learns(make_policy: MakePolicy) -> None:
    policy = make_policy()
    example = policy.model.codec.example(Demonstration(Prompt("Say it"), "it"))
    losses = [policy.update([example], Imitate())["loss"] for _ in range(40)]
    # A step may be too long, on each processor elsewhere, so that means of ten steps fall and not each loss.
    means = [fmean(losses[i : i + 10]) for i in range(0, 40, 10)]
    assert all(later < earlier for earlier, later in pairwise(means))
    # A summed loss below log 2 leaves each token more than half of the probability: greedy sampling says it.
    assert policy.measure([example], Imitate())["loss"] < math.log(2)
    (group,) = policy.snapshot().sample(
        [Prompt("Say it")], 1, Sampling(temperature=0, max_new_tokens=8), seed=0
    )
    assert group.completions[0].text == "it"
