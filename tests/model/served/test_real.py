"""A real vLLM server with the embedded model; `PALATE_VLLM_PYTHON` names the Python of its environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from palate.config import LearnerConfig, Sampling
from palate.learn import Likelihood, Policy
from palate.methods.oaif import OAIFConfig
from palate.model.served.connect import connected
from palate.model.served.process import PYTHON
from palate.types import Completion, Example, Group, Prompt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.embedded,
    pytest.mark.skipif(not os.environ.get(PYTHON), reason=f"{PYTHON} names no environment with vLLM"),
]

STOP = ("p", "a", "e")
PROMPTS = [Prompt(({"role": "user", "content": f"Name a {thing}."},)) for thing in ("colour", "fish", "city")]


def sampling(**changes: Any) -> Sampling:
    return Sampling.model_validate({"max_new_tokens": 12, **changes})


def policy_of(lora: bool) -> Policy:
    cfg = LearnerConfig.model_validate(
        {"dtype": "float32", "device": "cpu", "lora": lora, "lr": 1e-3 if lora else 1e-4}
    )
    return Policy.load(cfg, total_steps=10)


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "all weights"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Policy]:
    """A policy whose completions come from a server that is started beside it."""
    policy = policy_of(request.param)
    arguments = ("--max-model-len=256", "--max-num-seqs=16")
    cfg = OAIFConfig.model_validate({"data": "-", "rollouts": "vllm", "vllm_args": arguments})
    policy.model.sampler = connected(
        cfg, policy.model, tmp_path_factory.mktemp("served"), remember=lambda own: own, say=print
    )
    yield policy
    policy.model.sampler.close()


def gap(policy: Policy, groups: list[Group]) -> float:
    """The largest difference between the server's and the policy's log-probabilities of a token."""
    ours = policy.snapshot().logps(groups).rows()
    theirs = [c.logps for g in groups for c in g.completions]
    return max(
        abs(a - b)
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(x.tolist(), y or (), strict=True)
    )


def texts(groups: list[Group]) -> list[str]:
    return [completion.text for group in groups for completion in group.completions]


def test_each_version_samples_with_its_own_weights(served: Policy) -> None:
    first = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    again = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    assert gap(served, first) < 1e-2
    ids = tuple(served.model.codec.tokenizer.encode("purple purple purple"))
    for _ in range(4):
        served.update([Example(p, Completion("", ids)) for p in PROMPTS], Likelihood())
    old = gap(served, first)
    second = served.snapshot().sample(PROMPTS, 2, sampling(), seed=1)
    assert gap(served, second) < 1e-2 < old
    assert texts(second) != texts(first)
    assert sum(a == b for a, b in zip(texts(first), texts(again), strict=True)) >= 4  # seeds; bits may differ


def test_end_tokens_and_stop_texts_are_in_the_tokens(served: Policy) -> None:
    end_ids = served.model.codec.end_ids
    groups = served.snapshot().sample(PROMPTS, 4, sampling(max_new_tokens=48, stop=STOP), seed=2)
    for completion in [c for group in groups for c in group.completions]:
        whole = served.model.codec.decode(completion.token_ids)
        assert {
            "eos": completion.token_ids[-1] in end_ids,
            "stop": any(s in whole for s in STOP),
            "length": True,
        }[completion.finish]
        assert not any(s in completion.text for s in STOP)
    assert any(c.finish == "stop" for group in groups for c in group.completions)
    long = served.snapshot().sample(PROMPTS, 4, sampling(min_new_tokens=8), seed=2)
    assert min(len(c.token_ids) for group in long for c in group.completions) >= 8
