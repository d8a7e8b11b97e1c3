import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from palate.config import Sampling
from palate.errors import DataError
from palate.journal import Journal
from palate.learn import CachedReference, Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.model import Snapshot
from palate.testing import tiny_policy
from palate.types import Comparison, Group, Pair, Prompt

# Asked by peft of a network with activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

LOG2 = float(np.float32(math.log(2)))
LORA = {"lora": True, "lora_rank": 4}
FULL = {"lora": False}
PLAIN = {"fast": False}

PROMPTS = [Prompt("Hi"), Prompt("A longer prompt than that"), Prompt("?")]
TEXTS = [("Hello there, you!", "no"), ("yes", "something much longer"), ("", "a"), ("b", "c")]

MakePolicy = Callable[..., Policy]


def pairs_of(policy: Policy) -> list[Pair]:
    rows = [Comparison(Prompt(f"Q{i}" * (i + 1)), good, bad) for i, (good, bad) in enumerate(TEXTS)]
    return [policy.model.codec.pair(row) for row in rows]


def learn(policy: Policy, steps: int = 1) -> None:
    """Updates by a loss that needs no reference, so that nothing but the policy moves."""
    objective = Pairwise(PAIR_LOSSES["slic_rank"], strength=5.0)
    for _ in range(steps):
        policy.update(pairs_of(policy), objective)


def numbers(held: Snapshot | Policy, policy: Policy) -> Tensor:
    return held.logps(pairs_of(policy)).values


def drawn(snapshot: Snapshot) -> list[Group]:
    return snapshot.sample(PROMPTS, 3, Sampling(max_new_tokens=8), seed=5)


def all_numbers(groups: list[Group]) -> list:
    return [(c.token_ids, c.logps, c.sampling_logps) for g in groups for c in g.completions]


def continued(make_policy: MakePolicy, directory: Path, **options) -> Policy:
    """A policy over the adapter of another one that was trained and saved."""
    first = make_policy(model=LORA)
    learn(first, 3)
    first.save(directory)
    return tiny_policy(directory, model={"lora": True, **options})


# ---- live ------------------------------------------------------------------------------------------


def test_a_live_snapshot_shares_the_weights(make_policy: MakePolicy) -> None:
    policy = make_policy()
    snapshot = policy.snapshot()
    before = numbers(snapshot, policy)
    assert torch.equal(before, numbers(policy, policy))
    with torch.no_grad():
        policy.model.network.get_input_embeddings().weight[65] += 1.0
    assert not torch.equal(before, numbers(snapshot, policy))


def test_versions(make_policy: MakePolicy) -> None:
    policy = make_policy()
    first = policy.snapshot()
    learn(policy, 2)
    second = policy.snapshot()
    assert (first.version, second.version, policy.version) == (0, 2, 2)
    assert {c.policy_version for g in drawn(first) for c in g.completions} == {0}
    assert {c.policy_version for g in drawn(second) for c in g.completions} == {2}


def test_no_gradient_comes_out(make_policy: MakePolicy) -> None:
    policy = make_policy()
    assert not numbers(policy.snapshot(), policy).requires_grad


# ---- held while the policy moves on ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("model", "earlier"),
    [(LORA, 0), (LORA, 2), (FULL, 0), (FULL, 2), ({**LORA, **PLAIN}, 2), ({**FULL, **PLAIN}, 2)],
    ids=["fresh adapter", "later adapter", "full", "later full", "plain later adapter", "plain later full"],
)
def test_a_held_snapshot_stays_as_it_was_to_the_last_bit(
    make_policy: MakePolicy, model: dict, earlier: int, dtype: str
) -> None:
    policy = make_policy(model={**model, "dtype": dtype})
    learn(policy, earlier)
    snapshot = policy.snapshot()
    logps, groups = numbers(snapshot, policy), drawn(snapshot)
    learn(policy, 1)
    middle = policy.snapshot()
    middle_logps = numbers(middle, policy)
    learn(policy, 2)
    live = numbers(policy, policy)
    assert torch.equal(numbers(snapshot, policy), logps)
    assert all_numbers(drawn(snapshot)) == all_numbers(groups)
    assert torch.equal(numbers(middle, policy), middle_logps)
    # The policy did move, and using old snapshots has not moved it back.
    assert not torch.equal(logps, middle_logps)
    assert not torch.equal(middle_logps, live)
    assert torch.equal(numbers(policy, policy), live)


def test_a_snapshot_of_a_fresh_adapter_is_the_model_underneath(make_policy: MakePolicy) -> None:
    base = numbers(make_policy(), make_policy())
    policy = make_policy(model=LORA)
    snapshot = policy.snapshot()
    assert torch.equal(numbers(snapshot, policy), base)
    learn(policy, 2)
    assert torch.equal(numbers(snapshot, policy), base)


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_an_error_inside_an_old_snapshot_leaves_the_policy_as_it_is(
    make_policy: MakePolicy, model: dict
) -> None:
    policy = make_policy(model=model)
    learn(policy)
    snapshot = policy.snapshot()
    learn(policy)
    live = numbers(policy, policy)
    with pytest.raises(DataError):
        snapshot.sample([Prompt("x" * 300)], 1, Sampling(), seed=0)
    assert torch.equal(numbers(policy, policy), live)


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_learning_is_the_same_with_and_without_old_snapshots(make_policy: MakePolicy, model: dict) -> None:
    # Swapping weights in and out must neither disturb the optimizer nor what it points to.
    alone, watched = make_policy(model=model), make_policy(model=model)
    snapshots = []
    for _ in range(3):
        learn(alone)
        snapshots.append(watched.snapshot())
        learn(watched)
        for snapshot in snapshots:
            numbers(snapshot, watched)
    assert torch.equal(numbers(alone, alone), numbers(watched, watched))


# ---- what it costs ---------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Callable[[Policy], int]:
    """How often a policy's network has been deep-copied; transformers copies smaller things as it likes."""
    made: list[object] = []
    real = copy.deepcopy

    def noting(thing, *args):
        made.append(thing)
        return real(thing, *args)

    monkeypatch.setattr("palate.learn.learner.copy.deepcopy", noting)
    return lambda policy: sum(thing is policy.model.network for thing in made)


def test_a_dropped_snapshot_costs_nothing(make_policy: MakePolicy, copies: Callable) -> None:
    # As an online method does: a new snapshot every step, let go before the update.
    policy = make_policy()
    for _ in range(3):
        drawn(policy.snapshot())
        learn(policy)
    assert copies(policy) == 0


def test_a_held_snapshot_costs_one_copy(make_policy: MakePolicy, copies: Callable) -> None:
    policy = make_policy()
    snapshots = [policy.snapshot(), policy.snapshot()]
    learn(policy, 3)
    assert copies(policy) == 1
    assert torch.equal(numbers(snapshots[0], policy), numbers(snapshots[1], policy))


@pytest.mark.parametrize("earlier", [0, 1])
def test_with_an_adapter_the_network_is_never_copied(
    make_policy: MakePolicy, copies: Callable, earlier: int
) -> None:
    policy = make_policy(model=LORA)
    learn(policy, earlier)
    snapshot = policy.snapshot()
    learn(policy)
    numbers(snapshot, policy)
    assert copies(policy) == 0


# ---- the reference at the first step ---------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["snapshot", "cached"])
@pytest.mark.parametrize("budget", [100, 4096])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model",
    [LORA, FULL, {**LORA, "checkpointing": True}, {**LORA, **PLAIN}, {**FULL, **PLAIN}],
    ids=["lora", "full", "checkpointing", "plain lora", "plain full"],
)
def test_the_first_loss_is_log_2_to_the_last_bit(
    make_policy: MakePolicy, model: dict, dtype: str, budget: int, cached: bool
) -> None:
    policy = make_policy(model={**model, "dtype": dtype}, micro_batch_tokens=budget)
    ref = CachedReference(policy.snapshot()) if cached else policy.snapshot()
    metrics = policy.update(pairs_of(policy), Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=ref))
    assert metrics["loss"] == LOG2
    assert metrics["rewards/margins"] == 0.0
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["grad_norm"] > 0
    # The second is not: the reference has stayed behind.
    again = policy.update(pairs_of(policy), Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=ref))
    assert again["loss"] < LOG2


def test_a_continued_adapter_is_its_own_reference(make_policy: MakePolicy, tmp_path: Path) -> None:
    # Switching the adapter off would take the base model for the reference.
    base = numbers(make_policy(), make_policy())
    policy = continued(make_policy, tmp_path)
    snapshot = policy.snapshot()
    started = numbers(snapshot, policy)
    assert float((started - base).abs().max()) > 0.1
    objective = Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=snapshot)
    assert policy.update(pairs_of(policy), objective)["loss"] == LOG2
    learn(policy, 2)
    assert torch.equal(numbers(snapshot, policy), started)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_a_continued_adapter_is_off(
    make_policy: MakePolicy, tmp_path: Path, checkpointing: bool
) -> None:
    # Activation checkpointing needs training mode, in which dropout would make the policy differ from
    # its reference.
    continued(make_policy, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.5}))
    policy = tiny_policy(tmp_path, model={"lora": True, "checkpointing": checkpointing})
    objective = Pairwise(PAIR_LOSSES["dpo"], strength=0.1, ref=policy.snapshot())
    assert policy.update(pairs_of(policy), objective)["loss"] == LOG2


# ---- the journal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [LORA, FULL], ids=["lora", "full"])
def test_a_journal_knows_a_snapshot_by_its_version(
    make_policy: MakePolicy, model: dict, tmp_path: Path
) -> None:
    policy, plain = (make_policy(model={**model, **PLAIN}) for _ in range(2))
    policy.memory = Journal(tmp_path / "journal.db")
    for _ in range(2):
        found = [all_numbers(drawn(which.snapshot())) for which in (policy, plain)]
        assert found[0] == found[1]
        learn(policy)
        learn(plain)
    # A replay finds both; the second sampled nothing of the first.
    told: list[str] = []
    replay = make_policy(model={**model, **PLAIN})
    replay.memory = policy.memory
    replay.observe = lambda stage, amount: told.append(stage)
    drawn(replay.snapshot())
    learn(replay)
    assert all_numbers(drawn(replay.snapshot())) == found[0]
    assert set(told) == {"learn"}
    policy.memory.close()


def test_log_probabilities_are_kept_where_that_is_asked_for(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy(model=PLAIN)
    policy.memory = Journal(tmp_path / "journal.db")
    snapshot, pairs = policy.snapshot(), pairs_of(policy)
    plain = snapshot.logps(pairs)
    assert policy.memory.is_empty()
    kept = snapshot.logps(pairs, kept=True)
    assert torch.equal(kept.values, plain.values)
    assert torch.equal(kept.mask, plain.mask)
    # From there on they are what was found first, also after the weights have changed behind its back.
    with torch.no_grad():
        policy.model.network.get_input_embeddings().weight[65] += 1.0
    again = snapshot.logps(pairs[::-1], kept=True)
    assert [row.tolist() for row in again.rows()] == [
        row for i in (6, 4, 2, 0) for row in (r.tolist() for r in plain.rows()[i : i + 2])
    ]
    assert not torch.equal(snapshot.logps(pairs).values, plain.values)
    # Partly known is not known: all are computed, and the first ones stay.
    other = policy.model.codec.pair(Comparison(Prompt("new"), "yes", "no"))
    mixed = snapshot.logps([pairs[0], other], kept=True)
    assert torch.equal(mixed.rows()[0], plain.rows()[0])
    assert torch.equal(mixed.rows()[2], snapshot.logps([pairs[0], other]).rows()[2])
    learn(policy)
    later = policy.snapshot().logps(pairs, kept=True)
    assert not torch.equal(later.values, plain.values)
    policy.memory.close()


def test_a_cached_reference_is_the_same_when_a_run_goes_on(make_policy: MakePolicy, tmp_path: Path) -> None:
    # The last bits of a row depend on its micro-batch, and a resumed run asks for other ones first.
    found = []
    for order in (1, -1):
        policy = make_policy(model=PLAIN, micro_batch_tokens=4096)
        policy.memory = Journal(tmp_path / "journal.db")
        ref = CachedReference(policy.snapshot())
        rows = ref.logps(pairs_of(policy)[::order]).rows()
        found.append(sorted(row.tolist() for row in rows))
        policy.memory.close()
    assert found[0] == found[1]
