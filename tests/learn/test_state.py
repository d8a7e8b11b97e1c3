from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from palate.config import LearnerConfig, Sampling
from palate.errors import RunError
from palate.learn import Learner, Pairwise, Policy
from palate.learn.state import FILE, fingerprint, restore_state, save_state, state_bytes
from palate.losses import PAIR_LOSSES
from palate.model import Snapshot
from palate.testing import tiny_policy
from palate.types import Comparison, Pair, Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

MakePolicy = Callable[..., Policy]

LORA: dict[str, Any] = {"lora": True, "lora_rank": 2, "fast": False}
FULL: dict[str, Any] = {"lora": False, "fast": False}
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"model": LORA},
    "full": {"model": FULL},
    "bfloat16 lora": {"model": {**LORA, "dtype": "bfloat16"}},
    "bfloat16 full": {"model": {**FULL, "dtype": "bfloat16"}},
    "live masters": {"model": {**FULL, "dtype": "bfloat16"}, "masters": "live"},
    "schedule": {"model": LORA, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
}


def pairs_of(learner: Learner) -> list[Pair]:
    return [learner.model.codec.pair(Comparison(Prompt("Q"), "yes", "no"))]


def learn(policy: Policy, steps: int = 1, ref: Snapshot | None = None) -> None:
    loss = PAIR_LOSSES["slic_rank" if ref is None else "dpo"]
    for _ in range(steps):
        policy.update(pairs_of(policy), Pairwise(loss, strength=5.0, ref=ref))


def tensors(policy: Policy) -> dict[str, Tensor]:
    live = policy.model.network.state_dict()
    return {k: v.detach().clone() for k, v in (live | policy.optimizer.state()).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items()
    )


# ---- Saved and restored ----------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_one_that_is_restored_goes_on_to_the_last_bit(
    make_policy: MakePolicy, way: str, tmp_path: Path
) -> None:
    policy, fresh = (make_policy(total_steps=9, **WAYS[way]) for _ in range(2))
    ref, fresh_ref = policy.snapshot(), fresh.snapshot()
    learn(policy, 3, ref)
    numbers = save_state(policy, tmp_path)
    restore_state(fresh, tmp_path, numbers)
    assert same(tensors(policy), tensors(fresh))
    assert (fresh.version, fresh.optimizer.steps) == (3, 3)
    # The reference that was taken before is what the run started from, not what it came to.
    assert torch.equal(ref.logps(pairs_of(policy)).values, fresh_ref.logps(pairs_of(fresh)).values)
    for which, held in ((policy, ref), (fresh, fresh_ref)):
        learn(which, 3, held)
    assert same(tensors(policy), tensors(fresh))
    assert policy.optimizer.learning_rate() == fresh.optimizer.learning_rate()


def test_an_adapter_that_is_continued(make_policy: MakePolicy, tmp_path: Path) -> None:
    first = make_policy(model=LORA)
    learn(first, 2)
    first.save(tmp_path / "adapter")
    policy, fresh = (tiny_policy(tmp_path / "adapter", model=LORA) for _ in range(2))
    ref, fresh_ref = policy.snapshot(), fresh.snapshot()
    learn(policy, 2, ref)
    restore_state(fresh, tmp_path, save_state(policy, tmp_path))
    assert torch.equal(ref.logps(pairs_of(policy)).values, fresh_ref.logps(pairs_of(fresh)).values)
    for which, held in ((policy, ref), (fresh, fresh_ref)):
        learn(which, 2, held)
    assert same(tensors(policy), tensors(fresh))


def test_masters_keep_what_the_live_weights_cannot(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy = make_policy(model={**FULL, "dtype": "bfloat16"}, lr=1e-4)
    learn(policy, 2)
    save_state(policy, tmp_path)
    found = load_file(tmp_path / FILE)
    kinds = {name.split("/")[0] for name in found}
    assert kinds == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert {t.dtype for t in found.values()} == {torch.float32}
    weights = {name: t for name, t in found.items() if name.startswith("weight/")}
    assert not all(torch.equal(t, t.bfloat16().float()) for t in weights.values())


def test_a_learner_that_has_learnt_nothing(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, fresh = (make_policy(model=LORA) for _ in range(2))
    restore_state(fresh, tmp_path, save_state(policy, tmp_path))
    for which in (policy, fresh):
        learn(which, 2)
    assert same(tensors(policy), tensors(fresh))


def test_snapshots_that_are_held_stay_what_they_are(make_policy: MakePolicy, tmp_path: Path) -> None:
    for model in (LORA, FULL):
        policy = make_policy(model=model)
        learn(policy, 2)
        numbers = save_state(policy, tmp_path)
        learn(policy, 2)
        held, sampling = policy.snapshot(), Sampling(max_new_tokens=4)
        logps = held.logps(pairs_of(policy)).values
        drawn = held.sample([Prompt("Q")], 2, sampling, seed=0)
        restore_state(policy, tmp_path, numbers)
        assert (policy.version, held.version) == (2, 4)
        assert torch.equal(held.logps(pairs_of(policy)).values, logps)
        assert held.sample([Prompt("Q")], 2, sampling, seed=0) == drawn
        assert not torch.equal(policy.logps(pairs_of(policy)).values, logps)


def test_counts_of_what_was_skipped_come_back(make_policy: MakePolicy, tmp_path: Path) -> None:
    policy, fresh = (make_policy(model=LORA) for _ in range(2))
    policy.skipped, policy.skipped_in_a_row = 7, 2
    restore_state(fresh, tmp_path, save_state(policy, tmp_path))
    assert (fresh.skipped, fresh.skipped_in_a_row) == (7, 2)


def test_a_scalar_head_has_a_state_too(tiny: str, tmp_path: Path) -> None:
    fixed = {"model": tiny, "dtype": "float32", "device": "cpu", "lr": 1e-2, "lora": True, "lora_rank": 2}
    cfg = LearnerConfig.model_validate(fixed)
    learner, fresh = (Learner.load(cfg, total_steps=5, seed=s, head="scalar") for s in (0, 1))
    (pair,) = pairs_of(learner)
    assert not torch.equal(learner.scores([pair]), fresh.scores([pair]))  # heads are made up at random
    restore_state(fresh, tmp_path, save_state(learner, tmp_path))
    assert {n for n, _ in learner.model.trained()} == set(learner.optimizer.names)
    assert any("score" in name for name in learner.optimizer.names)
    assert torch.equal(learner.scores([pair]), fresh.scores([pair]))


# ---- Of another model ------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{**LORA, "lora_rank": 3}, FULL], ids=["rank", "full"])
def test_the_state_of_another_model_is_refused(
    make_policy: MakePolicy, other: dict[str, Any], tmp_path: Path
) -> None:
    numbers = save_state(make_policy(model=LORA), tmp_path)
    policy = make_policy(model=other)
    before = tensors(policy)
    with pytest.raises(RunError, match=r"does not fit the model: .* differs; expected the state of "):
        restore_state(policy, tmp_path, numbers)
    assert same(tensors(policy), before)
    assert policy.version == 0


# ---- How large, and which --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lora", "full", "bfloat16 full", "live masters"])
def test_how_much_room_it_takes(make_policy: MakePolicy, way: str, tmp_path: Path) -> None:
    policy = make_policy(**WAYS[way])
    learn(policy)
    policy.model.network.save_pretrained(tmp_path) if policy.model.peft is None else (
        policy.model.peft.save_pretrained(tmp_path)
    )
    save_state(policy, tmp_path)
    found = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    taken = sum(t.numel() * t.element_size() for tensors in found for t in tensors.values())
    assert state_bytes(policy) == pytest.approx(taken, rel=0.05)


def test_a_fingerprint_is_of_every_bit(make_policy: MakePolicy) -> None:
    policy = make_policy(model=LORA)
    first = fingerprint(policy)
    assert first == fingerprint(make_policy(model=LORA))
    found = {first, fingerprint(make_policy(model=FULL))}
    found |= {fingerprint(make_policy(model={**LORA, "dtype": "bfloat16"}))}
    parameters = dict(policy.model.network.named_parameters())
    for name in (next(iter(parameters)), next(n for n in parameters if "lora_B" in n)):
        with torch.no_grad():
            bits = parameters[name].view(torch.int32).view(-1)
            bits[-1] ^= 1  # the last bit of the last number
        found.add(fingerprint(policy))
    assert len(found) == 5
    # The sign of a zero is a bit as well.
    with torch.no_grad():
        parameters[next(n for n in parameters if "lora_B" in n)].view(-1)[0] = -0.0
    assert fingerprint(policy) not in found
