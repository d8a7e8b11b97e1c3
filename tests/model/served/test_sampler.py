"""Versions of a policy on a server: adapters and whole weights, faults, keys."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from palate.config import Sampling
from palate.errors import ConfigError, PalateError, RunError
from palate.journal import Journal
from palate.learn import Likelihood, Policy
from palate.memory import key_of
from palate.methods.oaif import OAIFConfig
from palate.model.served import api, connect
from palate.model.served.connect import connected
from palate.model.served.wire import GENERATE
from palate.testing import Fault, tiny_model
from palate.types import Completion, Example, Group, Prompt
from palate.world.base import Alone

SAMPLING = Sampling.model_validate({"max_new_tokens": 6})
PROMPTS = [Prompt("Q0"), Prompt("Q1"), Prompt("Q0")]

Make = Callable[..., Policy]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@contextmanager
def sampled_by(policy: Policy, url: str, directory: Path, **options: Any) -> Iterator[None]:
    fixed = {"data": "-", "model": policy.model.source, "rollouts": f"vllm:{url}"}
    cfg = OAIFConfig.model_validate(fixed | {"rollout_timeout": 5, "rollout_retries": 2} | options)
    said: list[str] = []
    policy.model.sampler = connected(
        cfg, policy.model, directory, remember=lambda identity: identity, say=said.append
    )
    try:
        yield
    finally:
        policy.model.sampler.close()
        policy.model.sampler = None


def tokens(groups: Sequence[Group]) -> list[tuple[int, ...]]:
    return [completion.token_ids for group in groups for completion in group.completions]


def learn(policy: Policy, text: str = "yes") -> None:
    """Take a step that changes the weights."""
    ids = tuple(policy.model.codec.tokenizer.encode(text))
    policy.update([Example(Prompt("Q0"), Completion(text, ids))], Likelihood())


@pytest.mark.parametrize("lora", [True, False])
def test_completions_come_from_the_version_that_samples(
    make_policy: Make, serve: Any, tmp_path: Path, lora: bool
) -> None:
    fake, policy = serve(), make_policy(model={"lora": lora}, lr=0.1)
    start = policy.snapshot()
    with sampled_by(policy, fake.url, tmp_path):
        first = policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)
        learn(policy)
        second = policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)
        assert tokens(start.sample(PROMPTS, 2, SAMPLING, seed=3)) == tokens(first)
    assert len(set(tokens(first))) > 3  # the second Q0 has seeds of its own
    assert tokens(first) != tokens(second)
    assert [c.policy_version for g in second for c in g.completions] == [1] * 6
    # The server's log-probabilities are those of the version itself.
    ours = policy.snapshot().logps(second).rows()
    theirs = [c.logps for g in second for c in g.completions]
    for a, b in zip(ours, theirs, strict=True):
        assert a.tolist() == pytest.approx(b, abs=1e-3)


def test_an_adapters_name_is_never_used_again_and_old_ones_are_removed(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    fake, policy = serve(), make_policy(model={"lora": True}, lr=0.1)
    with sampled_by(policy, fake.url, tmp_path):
        for _ in range(3):
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=4)  # the same version: nothing is loaded
            learn(policy)
        assert list(fake.adapters.values()) == [str(path) for path in (tmp_path / "published").iterdir()]
    loaded = [name for done, name in fake.log if done == "load"]
    assert len(loaded) == len(set(loaded)) == 3
    assert [name for done, name in fake.log if done == "unload"] == loaded  # the last one at the end
    assert not (tmp_path / "published").exists()


def test_all_weights_are_replaced_while_nobody_samples(make_policy: Make, serve: Any, tmp_path: Path) -> None:
    fake, policy = serve(), make_policy(lr=0.1)
    with sampled_by(policy, fake.url, tmp_path):
        drawn = policy.snapshot().begin(PROMPTS, 4, SAMPLING, seed=3)
        learn(policy)
        later = policy.snapshot().begin(PROMPTS, 4, SAMPLING, seed=3)
        groups = drawn.groups(), later.groups()
    assert [done for done, _ in fake.log] == ["reload", "reload"]
    assert tokens(groups[0]) != tokens(groups[1])
    second = max(i for i, path in enumerate(fake.server.paths) if path == "/collective_rpc")
    before = [body["sampling_params"] for body in fake.server.requests[:second] if "sampling_params" in body]
    assert len([options for options in before if options["min_tokens"] == 0]) == 12


def test_replies_of_exchanged_weights_are_refused(make_policy: Make, serve: Any, tmp_path: Path) -> None:
    fake, policy = serve(), make_policy()
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
        fake.label = "of another run"
        with pytest.raises(RunError, match="weights are 'of another run', expected 'palate-"):
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=4)


@pytest.mark.parametrize("lr", [1e-4, 0.3])
def test_a_server_that_keeps_old_weights_is_refused(
    make_policy: Make, serve: Any, tmp_path: Path, lr: float
) -> None:
    fake, policy = serve(stale=True), make_policy(lr=lr)
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)  # the weights are still those of the start
        learn(policy, "zzzz")
        with pytest.raises(ConfigError, match="still computes with older ones"):
            policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)


def test_a_server_that_keeps_some_old_weights_is_refused(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    fake, policy = serve(partial="embed"), make_policy(lr=0.3)
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)  # the weights are still those of the start
        for _ in range(4):
            learn(policy, "zzzz")
        with pytest.raises(ConfigError, match="has loaded the policy's weights, but its log-probabilities"):
            policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)


@pytest.mark.parametrize("vocabulary", [259, 10_000])
def test_a_server_with_another_model_is_refused_at_the_start(
    make_policy: Make, serve: Any, tmp_path: Path, vocabulary: int
) -> None:
    other = tiny_model(
        tmp_path / "other", chat=True, initializer_range=1.0, vocab_size=vocabulary, tie_word_embeddings=False
    )
    with pytest.raises(ConfigError, match=r"serves another model: its log-probabilities of 16 tokens differ"):
        sampled_by(make_policy(model={"lora": True}), serve(model=other).url, tmp_path).__enter__()


def test_a_server_that_does_not_use_an_adapter_is_refused(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    fake, policy = serve(stale=True), make_policy(model={"lora": True}, lr=0.3)
    for _ in range(4):
        learn(policy, "zzzz")  # as a policy that starts from an adapter, or resumes
    with (
        sampled_by(policy, fake.url, tmp_path),
        pytest.raises(ConfigError, match="has loaded the policy's adapter, but its log-probabilities differ"),
    ):
        policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)


def test_a_server_that_gets_another_model_is_refused_before_the_policy_learns(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    other = tiny_model(tmp_path / "other", chat=True, initializer_range=1.0)
    fake, policy = serve(), make_policy(model={"lora": True})
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)
        learn(policy)
        fake.restart(other)
        groups = policy.snapshot().sample(PROMPTS, 2, SAMPLING, seed=3)
        records = [Example(g.prompt, c) for g in groups for c in g.completions]
        with pytest.raises(RunError, match="serves another model or old weights"):
            policy.update(records, Likelihood())
    assert policy.version == 1


def test_failures_that_may_pass_are_retried_with_the_same_seed(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    failures = iter([Fault(500, b"oops"), Fault(action="reset"), Fault(503, b"busy")])
    policy = make_policy(model={"lora": True})

    def faulty(path: str, body: dict[str, Any], number: int) -> Any:
        own = path == GENERATE and body["sampling_params"]["max_tokens"] == 6
        return next(failures, None) if own else None

    fake = serve(faulty)
    with sampled_by(policy, fake.url, tmp_path, rollout_retries=4):
        groups = policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    assert len(fake.asked) == 6  # three of them twice
    assert len({body["sampling_params"]["seed"] for body in fake.asked}) == 3
    plain = serve(salt=fake.salt)
    with sampled_by(policy, plain.url, tmp_path):
        assert tokens(policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)) == tokens(groups)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(500, b"oops"), r"fails \(HTTP 500: oops; 3 attempts\); finished samples"),
        (
            Fault(action="hang"),
            r"does not answer \(no reply within 0.3 seconds; 3 attempts\).*timeout or .*--sampling-rows",
        ),
        (Fault(action="trickle"), r"does not answer \(no reply within 0.3 seconds"),
        (Fault(action="reset"), r"does not answer \(\w+Error: .*; 3 attempts\)"),
        (Fault(302, b"", (("location", "http://127.0.0.1:1"),)), "HTTP 302"),
        (Fault(body=b"not JSON"), "lacks something"),
    ],
)
def test_other_failures_are_one_sentence(
    make_policy: Make, serve: Any, tmp_path: Path, fault: Fault, words: str
) -> None:
    policy = make_policy(model={"lora": True})

    def faulty(path: str, body: dict[str, Any], number: int) -> Any:
        own = path == GENERATE and body["sampling_params"]["max_tokens"] == 6
        return fault if own else None

    options = {"rollout_timeout": 0.3} if fault.action in ("hang", "trickle") else {}
    with (
        sampled_by(policy, serve(faulty).url, tmp_path, **options),
        pytest.raises(PalateError, match=words),
    ):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)


PUBLISHING = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/collective_rpc"]


def publish_twice(policy: Policy) -> list[Group]:
    """Sample from two versions, so that both are published and the first is removed."""
    policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    learn(policy)
    return policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)


@pytest.mark.parametrize("path", PUBLISHING)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(500, b"oops"), r"fails \(HTTP 500: oops; 3 attempts\); finished samples"),
        (Fault(action="hang"), r"does not answer \(no reply within 0.5 seconds; 3 attempts\)"),
    ],
)
def test_publishing_that_keeps_failing_is_one_sentence(
    make_policy: Make, serve: Any, tmp_path: Path, path: str, fault: Fault, words: str
) -> None:
    fake = serve(lambda asked, body, number: fault if asked == path else None)
    policy = make_policy(model={"lora": "lora" in path}, lr=0.1)
    with (
        sampled_by(policy, fake.url, tmp_path, rollout_timeout=0.5),
        pytest.raises(RunError, match=words),
    ):
        publish_twice(policy)


@pytest.mark.parametrize("path", PUBLISHING)
def test_publishing_survives_a_failure_and_a_reply_that_is_lost(
    make_policy: Make, serve: Any, tmp_path: Path, path: str
) -> None:
    left = [Fault(action="reset"), Fault(500, b"oops")]

    def faulty(asked: str, body: dict[str, Any], number: int) -> Any:
        if asked != path or not left:
            return None
        if len(left) == 1:
            fake.reply(asked, body)  # done, but the client does not hear of it
        return left.pop()

    fake, policy = serve(faulty), make_policy(model={"lora": "lora" in path}, lr=0.1)
    with sampled_by(policy, fake.url, tmp_path):
        groups = publish_twice(policy)
        assert not left
        assert len(fake.adapters) == ("lora" in path)
    ours = policy.snapshot().logps(groups).rows()
    for a, b in zip(ours, [c.logps for g in groups for c in g.completions], strict=True):
        assert a.tolist() == pytest.approx(b, abs=1e-3)


def test_a_server_that_is_started_again_gets_the_next_version(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    fake, policy = serve(), make_policy(model={"lora": True}, lr=0.1)
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
        fake.restart()
        with pytest.raises(RunError, match="has lost the policy's weights"):
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=4)  # the same version
        learn(policy)
        assert tokens(policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=4))
        assert len(fake.adapters) == 1


@pytest.mark.parametrize("lora", [True, False])
def test_weights_that_cannot_be_written_are_one_sentence(
    make_policy: Make, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: bool
) -> None:
    policy = make_policy(model={"lora": lora})

    def full(place: Path, **options: Any) -> None:
        (place / "half").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(policy.model.peft if lora else policy.model.network, "save_pretrained", full)
    with sampled_by(policy, serve().url, tmp_path):
        with pytest.raises(RunError, match="cannot be written: No space left on device; the journal"):
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
        assert list((tmp_path / "published").iterdir()) == []


def test_a_failure_loses_the_chunks_under_way_only(make_policy: Make, serve: Any, tmp_path: Path) -> None:
    def fails(path: str, body: dict[str, Any], number: int) -> Any:
        return Fault(500, b"oops") if len(fake.asked) > 4 and body in fake.asked else None

    fake, policy = serve(fails), make_policy(model={"lora": True})
    policy.memory = journal = Journal(tmp_path / "journal.db")
    few = SAMPLING.model_copy(update={"sampling_rows": 2})
    with sampled_by(policy, fake.url, tmp_path), pytest.raises(RunError, match="HTTP 500"):
        policy.snapshot().sample([Prompt(f"Q{i}") for i in range(8)], 1, few, seed=3)
    assert len(list(journal.table())) == 4
    journal.close()


def test_requests_at_once_are_those_of_all_batches(make_policy: Make, serve: Any, tmp_path: Path) -> None:
    fake, policy = serve(), make_policy(model={"lora": True})
    few = SAMPLING.model_copy(update={"sampling_rows": 3})
    with sampled_by(policy, fake.url, tmp_path):
        policy.snapshot().sample([Prompt(f"Q{i}") for i in range(12)], 1, few, seed=3)
    assert fake.server.most_at_once[GENERATE] == 3


def test_a_server_that_cannot_be_used_is_refused_at_the_start(
    make_policy: Make, serve: Any, refuse: Any, tmp_path: Path
) -> None:
    policy = make_policy(model={"lora": True})
    with pytest.raises(ConfigError, match="without --logprobs-mode processed_logprobs"):
        sampled_by(policy, serve(processed=True).url, tmp_path).__enter__()
    off = serve(lambda path, body, number: refuse(403, "Scale-out endpoints are disabled.") if body else None)
    with pytest.raises(ConfigError, match="start it with --enable-scale-out"):
        sampled_by(policy, off.url, tmp_path).__enter__()
    with pytest.raises(RunError, match=r"server at http://127.0.0.1:9 does not answer"):
        sampled_by(policy, "http://127.0.0.1:9", tmp_path).__enter__()


def test_a_server_without_adapters_says_how_to_start_it(
    make_policy: Make, serve: Any, refuse: Any, tmp_path: Path
) -> None:
    policy = make_policy(model={"lora": True})
    fake = serve(lambda path, body, number: refuse(404, "Not Found") if "lora" in path else None)
    with (
        sampled_by(policy, fake.url, tmp_path),
        pytest.raises(ConfigError, match=r"cannot load an adapter .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    ):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)


def test_prompts_longer_than_the_servers_limit_are_named_before_sampling(
    make_policy: Make, serve: Any, tmp_path: Path
) -> None:
    fake, policy = serve(longest=20), make_policy(model={"lora": True})
    with (
        sampled_by(policy, fake.url, tmp_path),
        pytest.raises(
            ConfigError, match="but the vLLM server takes 20; start it with a larger --max-model-len"
        ),
    ):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    assert fake.asked == []


def test_the_key_is_sent_and_in_no_message(
    make_policy: Make, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "very-secret")
    policy = make_policy(model={"lora": True})
    fake = serve(
        lambda path, body, number: Fault(400, b"the key very-secret is odd") if "lora" in path else None
    )
    with sampled_by(policy, fake.url, tmp_path), pytest.raises(RunError, match=r"the key \[key\] is odd"):
        policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    assert {headers["authorization"] for headers in fake.server.headers} == {"Bearer very-secret"}


def test_no_proxy_gets_the_requests_to_this_machine(
    make_policy: Make, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    policy = make_policy(model={"lora": True})
    with sampled_by(policy, serve().url, tmp_path, rollout_retries=0):
        assert tokens(policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3))


def test_the_engine_is_part_of_the_key_of_samples(make_policy: Make, serve: Any, tmp_path: Path) -> None:
    class Known:
        def __init__(self) -> None:
            self.keys: list[str] = []

        def completions(self, key: str) -> None:
            self.keys.append(key)

        def keep_completions(self, key: str, *rest: Any, **purpose: Any) -> None:
            assert key in self.keys

    policy, known = make_policy(model={"lora": True}), Known()
    policy.memory = known  # type: ignore[assignment]
    policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    for version in ("0.32.0", "0.33.0"):
        with sampled_by(policy, serve(version=version).url, tmp_path):
            policy.snapshot().sample(PROMPTS, 1, SAMPLING, seed=3)
    assert len(set(known.keys)) == 3
    assert len(key_of("x")) == len(known.keys[0])


class TwoMachines(Alone):
    def gather(self, name: str, value: Any) -> list[Any]:
        return [value, "another" if name == "machines" else value]


def test_a_server_beside_the_run_is_refused_for_processes_on_several_machines(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "current", TwoMachines)
    monkeypatch.setattr(connect, "ServerProcess", None)  # none is started
    cfg = OAIFConfig.model_validate({"data": "-", "rollouts": "vllm"})
    with pytest.raises(ConfigError, match=r"on 2 machines \(.*another\).*give --rollouts vllm:URL"):
        connected(cfg, make_policy().model, tmp_path, remember=lambda own: own, say=print)


def test_the_address_may_be_that_of_the_api() -> None:
    cfg = OAIFConfig.model_validate({"data": "-", "rollouts": "vllm:http://127.0.0.1:8000/v1/"})
    assert cfg.rollouts == "vllm:http://127.0.0.1:8000"


@pytest.mark.parametrize(
    "rollouts",
    ["vLLM", "vllm:", "vllm:localhost:8000", "vllm:ftp://a", "vllm:http://u:p@a", "vllm:http://a?k=1"],
)
def test_other_names_of_engines_are_refused(rollouts: str) -> None:
    with pytest.raises(ValueError, match="rollouts"):
        OAIFConfig.model_validate({"data": "-", "rollouts": rollouts})


@pytest.mark.parametrize(
    "argument",
    [
        *("--host=0.0.0.0", "--host", "--ho=::", "--port=1", "--uds=/tmp/x", "--api-key=secret", "--api_key"),
        *("--model=x", "--served-model-name=x", "--served_model_name", "--logprobs-mode=processed_logprobs"),
    ],
)
def test_arguments_that_would_undo_the_servers_safety_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match="which Palate sets itself") as refused:
        OAIFConfig.model_validate({"data": "-", "rollouts": "vllm", "vllm_args": ("--seed=1", argument)})
    (error,) = refused.value.errors()  # type: ignore[attr-defined]
    assert "secret" not in error["msg"]
    kept = ("--max-model-len=9", "--model-impl=auto", "--hf-overrides={}", "-O0")
    given = {"data": "-", "rollouts": "vllm", "vllm_args": kept}
    assert OAIFConfig.model_validate(given).vllm_args == kept


@pytest.mark.parametrize(
    ("rollouts", "name", "value"),
    [
        ("local", "vllm_args", ("--seed=1",)),
        ("local", "rollout_timeout", 5),
        ("local", "rollout_retries", 0),
        ("vllm:http://127.0.0.1:1", "vllm_args", ("--seed=1",)),
        ("vllm:http://127.0.0.1:1", "vllm_python", "python"),
    ],
)
def test_options_of_a_server_without_one_are_refused(rollouts: str, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} has no effect with rollouts {rollouts}; give --rollouts"):
        OAIFConfig.model_validate({"data": "-", "rollouts": rollouts, name: value})
