"""Work of one process or of several; `python scenarios.py PLACE LIMIT NAME...` does it in one of several.

Each function returns what the process ends with, and a test compares the results of processes, or those of
several with that of one.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

import palate
from palate.cli import main
from palate.config import LearnerConfig, Sampling
from palate.errors import PalateError
from palate.launch.measure import worth_gathering
from palate.learn import CachedReference, Learner, Optimizer, Pairwise, Policy, Ranking
from palate.losses import PAIR_LOSSES
from palate.methods import METHODS
from palate.model import Snapshot, device, load
from palate.model.sharded import local_part, whole_tensor
from palate.run import led
from palate.testing import tiny_policy
from palate.types import Completion, Group, Pair, Prompt
from palate.world import current, guard
from palate.world.start import Together
from palate.world.wire import encode

Result = dict[str, Any]

ADAM_EPS = 1e-5
"""Adam's epsilon in all updates. Adam divides a gradient by its own size, so with the default of 1e-8 a
gradient that is zero but for rounding moves its weight by a part of a step, in any direction. With this one,
rounding of 1e-9 moves it by a ten-thousandth of a step."""


def pairs_for(policy: Learner, count: int) -> list[Pair]:
    made = []
    for i in range(count):
        prompt = Prompt(f"prompt {i} " + "x" * (i % 5))
        texts = ("yes " * (1 + i % 3), "no" * (1 + i % 4))
        made.append(Pair(prompt, *(policy.model.codec.completion(prompt, text) for text in texts)))
    return made


def weights(policy: Learner) -> dict[str, np.ndarray]:
    return {k: whole_tensor(t.detach()).float().numpy().copy() for k, t in policy.optimizer.state().items()}


def train(place: Path, *, resumed: bool = False, **options: Any) -> Result:
    """Three updates of which the batches are odd, then one with a single record.

    With `resumed`, the policy is put back to its start first, so that the reference is apart from it when the
    first pass computes with its weights, as in a run that resumes.
    """
    policy = tiny_policy(place / "model", lr=1e-3, adam_eps=ADAM_EPS, **options)
    pairs = pairs_for(policy, 7)
    objective = Pairwise(PAIR_LOSSES["dpo"], 0.5, CachedReference(policy.snapshot()))
    if resumed:
        start = {name: local_part(tensor).clone() for name, tensor in policy.optimizer.state().items()}
        policy.restore(start, version=0, updates=0)
    metrics = [policy.update(batch, objective) for batch in (pairs[:5], pairs[2:], pairs[:3], pairs[3:4])]
    held_out = policy.measure(pairs, objective)
    return {"weights": weights(policy), "metrics": metrics, "held_out": held_out}


def full_fast(place: Path) -> Result:
    return train(place)


def full_plain(place: Path) -> Result:
    return train(place, fast=False)


def lora_fast(place: Path) -> Result:
    return train(place, lora=True)


def lora_plain(place: Path) -> Result:
    return train(place, lora=True, fast=False)


def sharded_full_fast(place: Path) -> Result:
    return train(place, sharding="full")


def sharded_full_plain(place: Path) -> Result:
    return train(place, fast=False, sharding="full")


def sharded_lora_fast(place: Path) -> Result:
    return train(place, lora=True, sharding="full")


def sharded_lora_plain(place: Path) -> Result:
    return train(place, lora=True, fast=False, sharding="full")


def sharded_checkpointing(place: Path) -> Result:
    return train(place, sharding="full", checkpointing=True)


def sharded_nested(place: Path) -> Result:
    """A model that names a layer within a layer among those that are divided by themselves."""
    plain = LlamaPreTrainedModel._no_split_modules
    try:
        LlamaPreTrainedModel._no_split_modules = [*plain, "LlamaMLP"]
        return train(place, sharding="full")
    finally:
        LlamaPreTrainedModel._no_split_modules = plain


def rewards(place: Path, sharding: str = "none") -> Result:
    """A reward model: three updates, then the scores of all pairs; and the values of another head."""
    options = {"model": str(place / "model"), "dtype": "float32", "device": "cpu", "sharding": sharding}
    cfg = LearnerConfig.model_validate({**options, "lr": 1e-3, "adam_eps": ADAM_EPS, "lora": False})
    learner = Learner.load(cfg, total_steps=10, head="scalar", name="reward-model")
    pairs = pairs_for(learner, 7)
    metrics = [learner.update(batch, Ranking()) for batch in (pairs[:5], pairs[2:], pairs[:1])]
    critic = Learner.load(cfg, total_steps=10, head="value", name="critic")
    critic.model.network.score.weight.data.fill_(0.5)
    values = critic.values(pairs).values.numpy()
    scores = learner.scores(pairs).numpy()
    return {"weights": weights(learner), "metrics": metrics, "scores": scores, "values": values}


def sharded_rewards(place: Path) -> Result:
    return rewards(place, sharding="full")


def sharded_bfloat16(place: Path) -> Result:
    return train(place, dtype="bfloat16", sharding="full")


def sharded_lora_bfloat16(place: Path) -> Result:
    return train(place, dtype="bfloat16", sharding="full", lora=True, resumed=True)


def bfloat16(place: Path) -> Result:
    return train(place, dtype="bfloat16")


def lora_bfloat16(place: Path) -> Result:
    return train(place, dtype="bfloat16", lora=True)


ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"question {i}"} for i in range(6)],
    "pairs": [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"oh no {i * i}"} for i in range(7)
    ],
    "demonstrations": [{"prompt": f"question {i}", "completion": f"yes {i}"} for i in range(7)],
}
REWARD = """
def letters(completions, completion_ids):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, t)) % 101 + len(ids) / 7 for t, ids in zip(texts, completion_ids)]
"""
OTHER_REWARD = """
import os

with open(__file__ + ".ranks", "a") as file:
    file.write(os.environ.get("RANK", "0"))

def short(completions):
    return [-len(c) for c in completions]
"""
"""A reward that notes which process loads it."""

OWN: dict[str, dict[str, Any]] = {
    "rso": {"n": 6, "accept": 4},
    "click": {"n": 6, "threshold": 50.0},
    "rest": {"thresholds": [0.0]},
    "rlaif": {"reward_steps": 1},
}
"""Options for methods whose defaults do not suit the few rows."""


def methods(place: Path) -> Result:
    """A whole run of every method, and of one that ends at a bound of its KL."""
    ends = {f"{name}": trained(place, name) for name in sorted(METHODS)}
    return {
        "weights": ends | {"bounded": trained(place, "oaif", max_kl=1e-9, kl_every=1)},
        "loaders": loaders(place),
    }


def loaders(place: Path) -> str:
    """Return the ranks of the processes that loaded the reward of held-out completions."""
    notes = place / f"rows-{current().size}-0" / "other.py.ranks"
    return current().lead("ranks", lambda: "".join(sorted(set(notes.read_text()))))


def sharded_methods(place: Path) -> Result:
    """Runs with sharded weights: with samples and a reference, with a value function, with a bound."""
    arms: dict[str, Any] = {"dpo": {"lora": False}, "oaif": {}, "rlhf": {}, "reward-model": {"lora": False}}
    ends = {name: trained(place, name, sharding="full", **more) for name, more in arms.items()}
    bounded = trained(place, "oaif", max_kl=1e-9, kl_every=1, sharding="full", lora=False)
    return {"weights": ends | {"bounded": bounded}}


def whole_methods(place: Path) -> Result:
    """The runs of `sharded_methods` without sharding."""
    arms: dict[str, Any] = {"dpo": {"lora": False}, "oaif": {}, "rlhf": {}, "reward-model": {"lora": False}}
    ends = {name: trained(place, name, **more) for name, more in arms.items()}
    return {"weights": ends | {"bounded": trained(place, "oaif", max_kl=1e-9, kl_every=1, lora=False)}}


def trained(place: Path, name: str, **changes: Any) -> dict[str, np.ndarray]:
    """Run a method in a new directory; return the weights that it ends with."""
    world, way = current(), METHODS[name].variant(None)
    rows = place / f"rows-{world.size}-{world.rank}"
    if world.leads:
        rows.mkdir(exist_ok=True)
        for part, some in (("train", ROWS[way.learns_from]), ("held_out", ROWS[way.learns_from][:3])):
            (rows / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        (rows / "rewards.py").write_text(REWARD)
        (rows / "other.py").write_text(OTHER_REWARD)
    rows = Path(world.lead("rows", lambda: str(rows)))
    fixed = {
        "model": str(place / "model"),
        "data": str(rows / "train.jsonl"),
        "eval_data": str(rows / "held_out.jsonl"),
        "output": rows / "run",
        "overwrite": True,
        "reward": f"{rows / 'rewards.py'}:letters",
        "eval_reward": f"{rows / 'other.py'}:short",
        "rounds": 1,
        "steps": 3,
        "batch_size": 4,
        "max_new_tokens": 6,
        "lora_rank": 2,
        "dtype": "float32",
        "device": "cpu",
        "lr": 1e-3,
        "adam_eps": ADAM_EPS,
    }
    known = {**fixed, **OWN.get(name, {})}
    options = {key: value for key, value in known.items() if key in way.config.model_fields} | changes
    outcome = palate.train(name, METHODS[name].configure(options), display=None)
    return {k: v for k, v in weights(outcome.learner).items() if k.startswith("weight")}


def sharded_alone(place: Path) -> Result:
    policy = tiny_policy(place / "model", sharding="full")
    return said(lambda: current().lead("a judge", lambda: len(drawn(policy.snapshot()))))


def sharded_sampled(place: Path) -> Result:
    return sampled(place, sharding="full")


def sharded_lora_sampled(place: Path) -> Result:
    """Samples of the live policy and of its start after updates, which read two versions of the adapter."""
    policy = tiny_policy(place / "model", lr=1e-2, lora=True, sharding="full")
    return after_updates(policy)


def lora_sampled(place: Path) -> Result:
    return after_updates(tiny_policy(place / "model", lr=1e-2, lora=True))


def after_updates(policy: Policy) -> Result:
    start, pairs = policy.snapshot(), pairs_for(policy, 4)
    drawn(start)
    objective = Pairwise(PAIR_LOSSES["rso_hinge"], 0.5)
    policy.update(pairs, objective)
    middle = policy.snapshot()
    policy.update(pairs, objective)
    # The start samples first after the updates, with the adapter off; then the live weights, with it on.
    snapshots = (start, policy.snapshot(), middle)
    return {
        "tokens": [[c.token_ids for g in drawn(snapshot) for c in g.completions] for snapshot in snapshots],
        "scored": [snapshot.logps(pairs).values.numpy() for snapshot in snapshots],
    }


def drawn(snapshot: Snapshot) -> list[Group]:
    prompts = [Prompt(f"prompt {i} " + "x" * (i % 5)) for i in range(5)]
    return snapshot.sample(prompts, 3, Sampling(max_new_tokens=9), seed=1)


def sampled(place: Path, **options: Any) -> Result:
    policy = tiny_policy(place / "model", **options)
    groups = drawn(policy.snapshot())
    return {
        "tokens": [[c.token_ids for c in group.completions] for group in groups],
        "logps": [[c.logps for c in group.completions] for group in groups],
        "scored": policy.logps(groups).values.numpy(),
    }


class Spoilt:
    """An objective that has no finite loss for one record."""

    def __init__(self, inner: Pairwise, spoilt: Pair) -> None:
        self.inner, self.spoilt, self.needs = inner, spoilt, inner.needs

    def __call__(self, outputs: Any, records: Sequence[Pair]) -> Any:
        loss, numbers = self.inner(outputs, records)
        bad = torch.tensor([record is self.spoilt for record in records])
        return torch.where(bad, loss * torch.nan, loss), numbers


def not_finite(place: Path, sharding: str = "none") -> Result:
    policy = tiny_policy(place / "model", lr=1e-3, sharding=sharding)
    pairs, before = pairs_for(policy, 4), weights(policy)
    objective = Pairwise(PAIR_LOSSES["dpo"], 0.5, policy.snapshot())
    metrics = policy.update(pairs, Spoilt(objective, pairs[1]))  # process 1 of 2 has it
    same = all(np.array_equal(before[k], v) for k, v in weights(policy).items() if k.startswith("weight"))
    policy.update(pairs, objective)
    return {"skipped": metrics["skipped_updates"], "same": same, "version": policy.version}


def sharded_not_finite(place: Path) -> Result:
    return not_finite(place, sharding="full")


def other_batch(place: Path) -> Result:
    policy = tiny_policy(place / "model")
    pairs = pairs_for(policy, 4)
    own = pairs[: 3 + current().rank]
    return said(lambda: policy.update(own, Pairwise(PAIR_LOSSES["rso_hinge"], 0.5)))


def other_place(place: Path) -> Result:
    world = current()
    return said(lambda: world.gather(f"corner {world.rank}", None))


def leader_fails(place: Path) -> Result:
    def fail() -> None:
        raise PalateError("row 3 is empty; fill it")

    return said(lambda: current().lead("rows", fail))


def random_reward(place: Path) -> Result:
    calls = []

    def annotate(groups: Sequence[Group]) -> list[Group]:
        calls.append(len(groups))
        draw = random.SystemRandom().random
        return [replace(g, rewards=(draw(), None), parts={"a": (draw(), None)}) for g in groups]

    annotator = led(lambda: annotate)
    assert annotator is not None
    two = (Completion("a", (1,)), Completion("b", (2, 3)))
    groups = annotator([Group(Prompt("p"), two), Group(Prompt("q"), two)])
    return {"rewards": [[g.rewards, dict(g.parts)] for g in groups], "calls": calls}


def torch_fails(place: Path) -> Result:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such network interface\nin a file of torch")

    plain = dist.all_gather
    try:
        dist.all_gather = fail
        return said(lambda: current().gather("the meeting", None))
    finally:
        dist.all_gather = plain


def one_falls_back(place: Path) -> Result:
    """Process 1 cannot use the fast path."""
    plain = load.disagreement
    try:
        load.disagreement = lambda *_: "its numbers are odd" if current().rank == 1 else None
        return {"engine": type(tiny_policy(place / "model").model.engine).__name__}
    finally:
        load.disagreement = plain


def sharded_freed(place: Path) -> Result:
    """The copy for sampling, before and after an update; and what an offline run leaves out."""
    policy = tiny_policy(place / "model", lora=True, sharding="full")
    drawn(policy.snapshot())
    copied = weakref.ref(policy.model.engine._gathered.network)
    there = copied() is not None
    policy.update(pairs_for(policy, 2), Pairwise(PAIR_LOSSES["rso_hinge"], 0.5))
    gc.collect()
    lines: list[str] = []
    run: Any = SimpleNamespace(display=SimpleNamespace(say=lines.append))
    shown = worth_gathering(policy, [Prompt("a")], run)
    return {"before": there, "after": copied() is not None, "shown": len(shown), "lines": lines}


def said(act: Callable[[], Any]) -> Result:
    try:
        act()
    except PalateError as error:
        return {"error": type(error).__name__, "said": str(error)}
    return {"error": None}


# ---- These leave no world behind -------------------------------------------------------------------


def late(place: Path) -> Result:
    if current().rank == 1:
        time.sleep(8)
        return {}
    return said(lambda: current().gather("the meeting", None))


def crashed(place: Path) -> Result:
    """Process 1 ends as it does in a crash of a library."""
    if current().rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return said(lambda: current().gather("the meeting", None))


def stuck(place: Path) -> Result:
    """Process 0 waits where it cannot see that process 1 has ended."""
    guard.GRACE = 1.0
    if current().rank == 1:
        error = PalateError("row 3 is empty; fill it")
        if current().close(error):
            print(error, file=sys.stderr)
        time.sleep(5)
        os._exit(2)
    time.sleep(300)
    return {}


# ---- A run that is killed ----------------------------------------------------------------------------


def die_at_step(rank: int, step: int) -> None:
    """Kill this process in an optimizer step, if it has this rank."""
    plain = Optimizer.step

    def dying(self: Optimizer) -> float:
        if self.steps + 1 == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self)

    if os.environ["RANK"] == str(rank):
        Optimizer.step = dying  # type: ignore[method-assign]


def work(place: Path, names: Sequence[str], limit: float) -> None:
    with Together(limit=limit) as world:
        for name in names:
            result = globals()[name](place)
            (place / f"{name}.{world.rank}").write_bytes(encode(result))
    os._exit(0)  # without a wait for processes that do not answer


if __name__ == "__main__":
    device.has_bfloat16 = lambda _: True  # slow without units for it, but right
    torch.set_num_threads(1)
    if sys.argv[1] == "palate":
        if "DIE" in os.environ:
            die_at_step(*(int(part) for part in os.environ["DIE"].split(":")))
        sys.exit(main(sys.argv[2:]))
    work(Path(sys.argv[1]), sys.argv[3:], float(sys.argv[2]))
