"""A small method, the means to cut it off, and processes that die."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from palate.annotate import Annotator, scored
from palate.config import LearnerConfig, RunConfig, Sampling
from palate.learn import Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.run import Display, Run
from palate.testing import ScriptedScorer
from palate.types import Group, Pair, Prompt

FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


class ToyConfig(LearnerConfig, RunConfig):
    """Numbers of the toy method."""

    steps: int = 4
    """As everywhere."""
    prompts: int = 2
    """Something that may not change."""
    sampling_rows: int = 2
    """A chunk has four times as many."""


@dataclass
class Toy:
    """Online DPO without frills; what a run is made of, in one place.

    Attributes:
        after: called when a step has been logged, before it may be saved.
        asked: texts that the annotator was asked about.
        said: lines that the display was to show.
    """

    options: dict[str, Any]
    after: Callable[[Run, int], None] = lambda run, step: None
    asked: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def config(self, **changes: Any) -> ToyConfig:
        return ToyConfig.model_validate(self.options | changes)

    def __call__(self, **changes: Any) -> tuple[Run, Policy]:
        cfg = self.config(**changes)
        display = Display(quiet=True)
        display.say = self.said.append  # type: ignore[method-assign]
        with Run(cfg, method="toy", display=display) as run:
            policy = Policy.load(cfg, total_steps=cfg.steps, seed=run.seed("adapter"))
            run.attach(policy)
            self._train(policy, run.annotator(self._annotator()), cfg, run)
            run.save(policy)
            run.finish({"steps": policy.version})
        return run, policy

    def _train(self, policy: Policy, annotate: Annotator, cfg: ToyConfig, run: Run) -> None:
        objective = Pairwise(PAIR_LOSSES["dpo"], 0.5, policy.snapshot())
        prompts = [Prompt(f"question {i}") for i in range(cfg.prompts)]
        sampling = Sampling(max_new_tokens=4, sampling_rows=cfg.sampling_rows)
        for step in run.steps(cfg.steps, policy):
            seed = run.seed("sample", step)
            groups = annotate(policy.snapshot().sample(prompts, 2, sampling, seed=seed))
            run.log(step, policy.update([_pair(group) for group in groups], objective))
            self.after(run, step)

    def _annotator(self) -> Annotator:
        def score(text: str) -> float:
            self.asked.append(text)
            return float(sum(map(ord, text)) % 101)

        return scored(ScriptedScorer(score))


def _pair(group: Group) -> Pair:
    assert group.rewards is not None
    first, second = group.completions
    better = (group.rewards[0] or 0) >= (group.rewards[1] or 0)
    return Pair(group.prompt, *((first, second) if better else (second, first)))


@pytest.fixture
def toy(tiny: str, tmp_path: Path) -> Toy:
    """The method over a tiny model, in `run` of the test's directory; a step costs some 50 ms."""
    fixed = {"model": tiny, "dtype": "float32", "device": "cpu", "lora": False, "fast": False, "lr": 1e-2}
    return Toy({**fixed, "lora_rank": 2, "output": tmp_path / "run", "checkpoint_every": 1})


def _at(cut: int) -> Callable[[Run, int], None]:
    def after(run: Run, step: int) -> None:
        if step == cut:
            raise KeyboardInterrupt

    return after


@pytest.fixture
def interrupted() -> Callable[..., None]:
    """Runs a toy and interrupts it when step `at`, counted from 0, has been logged."""

    def run(toy: Toy, at: int, **changes: Any) -> None:
        before, toy.after = toy.after, _at(at)
        with pytest.raises(KeyboardInterrupt):
            toy(**changes)
        toy.after = before

    return run


def _tensors(policy: Policy) -> dict[str, Tensor]:
    live = {name: p.detach() for name, p in policy.model.network.state_dict().items()}
    return {name: t.clone() for name, t in (live | policy.optimizer.state()).items()}


@pytest.fixture
def tensors() -> Callable[[Policy], dict[str, Tensor]]:
    """All that an update changes: live weights, the optimizer's own and its moments."""
    return _tensors


@pytest.fixture
def same() -> Callable[[Policy, Policy], bool]:
    """Whether two policies are the same to the last bit, and would go on alike."""

    def compare(one: Policy, other: Policy) -> bool:
        mine, theirs = _tensors(one), _tensors(other)
        return (
            mine.keys() == theirs.keys()
            and all(torch.equal(mine[name], theirs[name]) for name in mine)
            and (one.version, one.optimizer.steps) == (other.version, other.optimizer.steps)
        )

    return compare


@pytest.fixture
def rows() -> Callable[[Path], list[dict[str, Any]]]:
    """The rows of metrics.jsonl without what a clock says."""

    def read(directory: Path) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        timed = ("time/", "step_time", "sampling/tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(timed)} for row in found]

    return read


@pytest.fixture
def dies() -> Callable[..., bool]:
    """Does some work in another process, which is gone at its n-th touch of a file of a directory.

    Gone without a word: nothing is closed, and no `finally` is run. Gives whether it came to that.
    """

    def die(work: Callable[[], object], directory: Path, n: int, events: Sequence[str] = ()) -> bool:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, 9), "the work itself failed"
            return code == 9
        left, wanted = n, set(events) or FILE_EVENTS

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal left
            if event in wanted and any(str(directory) in str(a) for a in arguments[:2]):
                left -= 1
                if left == 0:
                    os._exit(9)

        try:
            sys.addaudithook(count)
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    return die
