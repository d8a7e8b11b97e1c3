"""A run with two learners: a policy, and a critic with weights, optimizer and reference of its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from palate.annotate import Annotator
from palate.config import LearnerConfig, Sampling
from palate.errors import NonFiniteError, RunError
from palate.learn import Learner, Needs, Pairwise, Policy, Ranking
from palate.losses import PAIR_LOSSES
from palate.model import Outputs, load_model
from palate.run import Run
from palate.run.checkpoint import Position
from palate.run.checkpoints import Checkpoints
from palate.run.moves import NOTE
from palate.types import Comparison, Group, Pair, Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

Interrupt = Callable[..., None]
LORA = {"lora": True, "lora_rank": 2, "fast": False}
FULL = {"lora": False, "fast": False}


def critic_over(model: str, *, name: str = "critic", seed: int = 1, **options: Any) -> Learner:
    """A learner with a scalar head over a model's directory."""
    fixed = {"model": model, "dtype": "float32", "device": "cpu", "lr": 3e-3, "schedule": "linear"}
    cfg = LearnerConfig.model_validate(fixed | FULL | options)
    return Learner.load(cfg, total_steps=20, seed=seed, head="scalar", name=name)


def learn(learner: Learner, steps: int = 1) -> None:
    pair = learner.model.codec.pair(Comparison(Prompt("Q"), "yes", "no"))
    slic = Pairwise(PAIR_LOSSES["slic_rank"], strength=5.0)
    for _ in range(steps):
        learner.update([pair], slic if isinstance(learner, Policy) else Ranking())


def at(step: int) -> Position:
    return Position(0, step, 0, metrics=step, ended=False)


def opened(directory: Path) -> Checkpoints:
    return Checkpoints(directory, "this", keep=2)


# ---- A method with a critic ------------------------------------------------------------------------


@dataclass
class Both:
    """The toy method, with a critic that learns the same pairs, twice a step, from the model `critic`."""

    toy: Any
    critic: Path
    critic_options: dict[str, Any]

    def __call__(self, **changes: Any) -> tuple[Run, Policy, Learner]:
        held: list[Learner] = []

        def train(policy: Policy, annotate: Annotator, cfg: Any, run: Run) -> None:
            critic = critic_over(str(self.critic), seed=run.seed("critic"), **self.critic_options)
            held.append(critic)
            run.attach(critic)
            objective = Pairwise(PAIR_LOSSES["dpo"], 0.5, policy.snapshot())
            prompts, sampling = [Prompt("one"), Prompt("two")], Sampling(max_new_tokens=4)
            for step in run.steps(cfg.steps, policy, critic):
                groups = policy.snapshot().sample(prompts, 2, sampling, seed=run.seed("sample", step))
                pairs = [ordered(group) for group in annotate(groups)]
                for _ in range(2):
                    values = critic.update(pairs, Ranking())
                run.log(step, policy.update(pairs, objective), {f"critic/{k}": v for k, v in values.items()})
                self.toy.after(run, step)

        self.toy._train = train
        run, policy = self.toy(**changes)
        return run, policy, held[0]

    @property
    def after(self) -> Callable[[Run, int], None]:
        return self.toy.after  # type: ignore[no-any-return]

    @after.setter
    def after(self, value: Callable[[Run, int], None]) -> None:
        self.toy.after = value


def ordered(group: Group) -> Pair:
    assert group.rewards is not None
    best = max(range(2), key=lambda i: group.rewards[i])  # type: ignore[index]
    return Pair(group.prompt, group.completions[best], group.completions[1 - best])


@pytest.fixture
def both(toy: Any, tiny: str, tmp_path: Path) -> Both:
    """The method, its critic over a copy of the tiny model, with an adapter."""
    return Both(toy, Path(shutil.copytree(tiny, tmp_path / "value-model")), LORA)


@pytest.mark.parametrize(
    ("options", "critic_options"),
    [({}, LORA), ({**LORA, "checkpoint_every": 2}, FULL), ({"dtype": "bfloat16"}, {"dtype": "bfloat16"})],
    ids=["adapter beside all weights", "all weights beside an adapter", "float32 copies"],
)
@pytest.mark.parametrize("cut", [0, 2])
def test_both_end_as_if_they_had_not_been_interrupted(
    both: Both,
    interrupted: Interrupt,
    tmp_path: Path,
    same: Any,
    rows: Any,
    options: dict[str, Any],
    critic_options: dict[str, Any],
    cut: int,
) -> None:
    both.critic_options = critic_options
    whole, policy, critic = both(output=tmp_path / "whole", **options)
    interrupted(both, cut, **options)
    resumed, policy_again, critic_again = both(**options)
    assert same(policy, policy_again)
    assert same(critic, critic_again)
    assert (policy.version, critic.version) == (4, 8)
    assert rows(whole.directory) == rows(resumed.directory)
    assert any(row["critic/loss"] != rows(whole.directory)[0]["critic/loss"] for row in rows(whole.directory))


def test_a_process_that_is_killed_at_any_moment(
    both: Both, tmp_path: Path, same: Any, dies: Callable[..., bool]
) -> None:
    _, policy, critic = both(output=tmp_path / "whole", steps=2)
    both.toy.options["output"] = directory = tmp_path / "killed"
    kills = 0
    for n in (30, 60, 90, 120):  # touches of a file since the start before
        kills += dies(lambda: both(steps=2), directory, n)
    _, policy_again, critic_again = both(steps=2)
    assert kills > 1
    assert same(policy, policy_again)
    assert same(critic, critic_again)


def test_the_layout_of_a_checkpoint(both: Both) -> None:
    run, policy, critic = both(steps=2)
    path = run.directory / "checkpoints" / "step-2"
    own = {p.name for p in path.iterdir() if p.is_file()}
    assert {"model.safetensors", "state.safetensors", "checkpoint.json"} <= own
    assert [p.name for p in path.iterdir() if p.is_dir()] == ["critic"]
    assert {"adapter_model.safetensors", "state.safetensors"} <= {p.name for p in (path / "critic").iterdir()}
    note = json.loads((path / NOTE).read_text())
    assert (note["learner"]["version"], note["beside"]["critic"]["version"]) == (2, 4)
    # Each is a model to load: the policy by the run's name, the critic by its place in the checkpoint.
    cfg = {"dtype": "float32", "device": "cpu", **FULL}
    pair = policy.model.codec.pair(Comparison(Prompt("Q"), "yes", "no"))
    again = Policy(
        load_model(LearnerConfig.model_validate({**cfg, "model": str(run.directory)})),
        LearnerConfig(lr=1.0),
        total_steps=1,
    )
    assert torch.equal(again.logps([pair]).values, policy.logps([pair]).values)
    valued = critic_over(str(path / "critic"), **LORA)
    torch.testing.assert_close(valued.scores([pair]), critic.scores([pair]), atol=1e-6, rtol=0)


def test_a_run_with_one_learner_is_written_as_ever(toy: Any) -> None:
    run, _ = toy(steps=1)
    path = run.directory / "checkpoints" / "step-1"
    assert not any(p.is_dir() for p in path.iterdir())
    note = json.loads((path / NOTE).read_text())
    assert note.keys() == {"run", "position", "learner", "files", "key"}


# ---- Refused by name -------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "gone"])
@pytest.mark.parametrize("file", ["state.safetensors", "adapter_model.safetensors"])
def test_a_damaged_critic_is_refused_by_name(
    both: Both, interrupted: Interrupt, file: str, damage: str
) -> None:
    interrupted(both, 2)
    path = both.toy.options["output"] / "checkpoints" / "step-2" / "critic" / file
    data = path.read_bytes()
    path.unlink() if damage == "gone" else path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(RunError, match=rf"step-2' is damaged: critic/{file} (is missing|has changed)"):
        both()


def test_another_reference_of_the_critic_is_refused_by_name(both: Both, interrupted: Interrupt) -> None:
    interrupted(both, 1)
    tensors = load_file(both.critic / "model.safetensors")
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, both.critic / "model.safetensors", metadata={"format": "pt"})
    told = r"^the critic's model '?.*value-model'? changed since the run in '.*' started \(hash "
    with pytest.raises(RunError, match=told):
        both()


def test_what_is_refused_of_several_changes_nothing(
    toy: Any, interrupted: Interrupt, tiny: str, make_policy: Callable[..., Policy]
) -> None:
    interrupted(toy, 2)
    cfg = toy.config()
    before = (cfg.output / "metrics.jsonl").read_bytes()
    with Run(cfg, method="toy") as run:
        run.journal.keep_fact("the weights of critic", "0" * 64)
        policy = Policy.load(cfg, total_steps=cfg.steps, seed=run.seed("adapter"))
        with pytest.raises(RunError, match=r"^the critic's model .* \(hash \w{12}, was 000000000000\)"):
            run.attach(policy, critic_over(tiny))
    assert (cfg.output / "metrics.jsonl").read_bytes() == before


class Broken:
    """A loss of scores that is not a number."""

    needs: ClassVar[Needs] = Needs(head="scalar")

    def __call__(self, outputs: Outputs, records: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert outputs.scores is not None
        return outputs.scores.view(-1, 2).sum(-1) * math.nan, {}


def test_a_critic_that_is_not_finite_is_named(tiny: str) -> None:
    critic = critic_over(tiny)
    pair = critic.model.codec.pair(Comparison(Prompt("Q"), "yes", "no"))
    for _ in range(2):
        critic.update([pair], Broken())
    with pytest.raises(NonFiniteError, match=r"^the loss is nan at update 1 of the critic, the 3rd time"):
        critic.update([pair], Broken())


# ---- Checkpoints of several ------------------------------------------------------------------------


def test_each_has_its_own_state(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path, same: Any
) -> None:
    policy, critic, judge = make_policy(model=FULL), critic_over(tiny), critic_over(tiny, name="judge")
    learn(policy, 3)
    learn(critic, 2)
    learn(judge, 1)
    opened(tmp_path).save(at(1), policy, critic, judge)
    again = make_policy(model=FULL), critic_over(tiny), critic_over(tiny, name="judge")
    first, second, third = again
    # The names count, not the order of those beside the first.
    assert opened(tmp_path).restore(0, first, third, second) == at(1)
    for old, new in zip((policy, critic, judge), again, strict=True):
        assert same(old, new)
        learn(old)
        learn(new)
        assert same(old, new)
    assert not same(critic, judge)


def test_the_counts_of_what_was_skipped_are_each_ones_own(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path
) -> None:
    policy, critic = make_policy(model=FULL), critic_over(tiny)
    policy.skipped, critic.skipped, critic.skipped_in_a_row = 1, 5, 2
    opened(tmp_path).save(at(1), policy, critic)
    again, beside = make_policy(model=FULL), critic_over(tiny)
    opened(tmp_path).restore(0, again, beside)
    assert (again.skipped, again.skipped_in_a_row) == (1, 0)
    assert (beside.skipped, beside.skipped_in_a_row) == (5, 2)


def test_other_learners_than_were_saved_are_named(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path
) -> None:
    policy, critic, judge = make_policy(model=FULL), critic_over(tiny), critic_over(tiny, name="judge")
    opened(tmp_path).save(at(1), policy, critic)
    for given, expected in [((policy,), "policy"), ((policy, judge), "policy, judge")]:
        with pytest.raises(
            RunError, match=rf"step-1' holds the learners policy, critic, expected {expected}; start over"
        ):
            opened(tmp_path).restore(0, *given)


def test_a_critic_that_does_not_fit_leaves_the_policy_as_it_is(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path, same: Any
) -> None:
    policy = make_policy(model=FULL)
    learn(policy)
    opened(tmp_path).save(at(1), policy, critic_over(tiny, **LORA))
    fresh, untouched = (make_policy(model=FULL) for _ in range(2))
    with pytest.raises(RunError, match=r"step-1/critic' does not fit the model: .* differs"):
        opened(tmp_path).restore(0, fresh, critic_over(tiny, **{**LORA, "lora_rank": 3}))
    assert same(fresh, untouched)


def test_two_learners_of_one_name_are_not_saved(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="need different names"):
        opened(tmp_path / "c").save(at(1), make_policy(model=FULL), critic_over(tiny, name="policy"))
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_holds_learners_as_they_are(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path
) -> None:
    policy, critic = make_policy(model=FULL), critic_over(tiny)
    checkpoints = opened(tmp_path)
    path = checkpoints.save(at(1), policy, critic)
    assert checkpoints.holding(policy, critic) == checkpoints.holding(policy) == path
    assert checkpoints.holding(policy, critic_over(tiny, name="judge")) is None
    learn(critic)
    assert checkpoints.holding(policy) == path
    assert checkpoints.holding(policy, critic) is None
    # Where a critic has learnt on and its policy has not, the place in the run is no sign that all is saved.
    assert checkpoints.save(at(1), policy, critic) == path
    latest = opened(tmp_path).latest
    assert latest is not None
    assert latest.beside["critic"]["version"] == 1


def test_a_kill_at_any_moment_of_a_save_leaves_both_old_or_both_new(
    make_policy: Callable[..., Policy], tiny: str, tmp_path: Path, dies: Callable[..., bool]
) -> None:
    policy, critic = make_policy(model=LORA), critic_over(tiny, **LORA)
    saved, directory = tmp_path / "saved", tmp_path / "copy"
    opened(saved).save(at(1), policy, critic)
    learn(policy)
    learn(critic, 2)
    fresh, beside = make_policy(model=LORA), critic_over(tiny, **LORA)
    met: list[tuple[int, int]] = []
    for n in range(1, 200):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(saved, directory)
        checkpoints = Checkpoints(directory, "this", keep=1)
        dead = dies(lambda checkpoints=checkpoints: checkpoints.save(at(2), policy, critic), directory, n)
        position = Checkpoints(directory, "this", keep=1).restore(0, fresh, beside)
        assert position is not None
        assert position.step == fresh.version + 1
        assert not list(directory.glob(".*"))
        met.append((fresh.version, beside.version))
        if not dead:
            break
    assert len(met) > 30
    assert met == sorted(met)
    assert set(met) == {(0, 0), (1, 2)}
