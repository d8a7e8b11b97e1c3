from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

import palate
from palate import loops
from palate.config import LearnerConfig
from palate.learn import Learner, Policy, PolicyGradient, ValueRegression
from palate.methods import METHODS
from palate.methods.rlhf import RLHFConfig, load_critic, rlhf
from palate.model import weight_bytes
from palate.run import Run
from palate.testing import FaultyServer, judge_reply
from palate.types import Example, Group, Prompt

FIXED = {"data": "-", "dtype": "float32", "device": "cpu", "lora": False, "lr": 3e-3, "max_new_tokens": 5}


@pytest.fixture
def config(base: str, tmp_path: Path) -> Callable[..., RLHFConfig]:
    def make(**options: Any) -> RLHFConfig:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return RLHFConfig.model_validate({**FIXED, "model": base, "output": output, **options})

    return make


def learners(cfg: RLHFConfig) -> tuple[Policy, Learner | None]:
    policy = Policy.load(cfg, total_steps=1)
    return policy, next(iter(load_critic(policy, cfg, seed=0)), None)


def scored(score: Callable[[tuple[int, ...]], float | None]) -> Callable[[Sequence[Group]], list[Group]]:
    """An annotator by token ids, without a penalty for completions that were cut."""
    return lambda groups: [g.annotated(tuple(score(c.token_ids) for c in g.completions)) for g in groups]


def gradients(learner: Learner) -> list[Tensor]:
    """Gradients of the next update instead of a step."""
    kept: list[Tensor] = []

    def step() -> float:
        kept.extend(g.clone() for g in learner.optimizer.gradients() if g is not None)
        learner.optimizer.drop_gradients()
        return 0.0

    learner.optimizer.step = step  # type: ignore[method-assign]
    return kept


def shift(learner: Learner, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in learner.model.trained():
            p.add_(size * torch.randn(p.shape, generator=generator))
    learner.model.revision += 1
    learner.version += 1


# ---- One update against an independent implementation ------------------------------------------------


def oracle(
    network: Any, head: Tensor | None, groups: Sequence[Group], prompt_ids: Callable[[Prompt], Sequence[int]]
) -> list[Tensor]:
    """Log-probabilities, or values with a head, of every completion by a plain forward pass in float64."""
    rows = []
    for group in groups:
        for c in group.completions:
            start = len(prompt_ids(group.prompt))
            ids = torch.tensor([[*prompt_ids(group.prompt), *c.token_ids]])
            if head is None:
                logps = network(ids).logits[0, start - 1 : -1].log_softmax(-1)
                rows.append(logps.gather(-1, ids[0, start:, None])[:, 0])
            else:
                rows.append(network.model(ids).last_hidden_state[0, start - 1 : -1] @ head)
    return rows


def doubled(learner: Learner, like: str) -> Any:
    """The learner's trunk in float64, as transformers computes it."""
    network: Any = AutoModelForCausalLM.from_pretrained(like, dtype=torch.float64)
    own = {k: v.double() for k, v in learner.model.network.state_dict().items() if k != "score.weight"}
    network.load_state_dict(own, strict=False)
    return network.eval()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("micro", [16, 10_000])
def test_an_update_equals_an_independent_one_in_float64(
    config: Callable[..., RLHFConfig], base: str, fast: bool, micro: int
) -> None:
    cfg = config(fast=fast, micro_batch_tokens=micro, batch_size=6, clip=0.05, value_clip=0.1, beta=0.3)
    policy, critic = learners(cfg)
    assert critic is not None
    ref = Policy.load(cfg, total_steps=1)
    shift(ref, 0.02, 5)
    shift(critic, 0.1, 6)
    prompts = [Prompt(f"q{i}" * (i + 1)) for i in range(6)]
    groups = scored(lambda ids: ids[0] / 100 - len(ids))(
        policy.snapshot().sample(prompts, 1, cfg.sampling, seed=1)
    )
    ids = policy.model.codec.prompt_ids
    with Run(cfg, method="rlhf") as run, torch.no_grad():
        rollouts, numbers = loops.roll_out(
            policy, critic, ref.snapshot(), groups, cfg, run, step=0, beta=cfg.beta, centre=0.25
        )
        old = oracle(doubled(policy, base), None, groups, ids)
        refs = oracle(doubled(ref, base), None, groups, ids)
        head = critic.model.network.score.weight[0].double()
        values = oracle(doubled(critic, base), head, groups, ids)

    # Advantages, token by token.
    advantages: list[list[float]] = []
    for group, o, r, v in zip(groups, old, refs, values, strict=True):
        assert group.rewards is not None
        assert group.rewards[0] is not None
        rewards = [-0.3 * float(a - b) for a, b in zip(o, r, strict=True)]
        rewards[-1] += group.rewards[0] - 0.25
        row, later = [], 0.0
        for t in reversed(range(len(rewards))):
            after = float(v[t + 1]) if t + 1 < len(rewards) else 0.0
            later = rewards[t] + after - float(v[t]) + 0.95 * later
            row.insert(0, later)
        advantages.append(row)
    flat = [a for row in advantages for a in row]
    mean = math.fsum(flat) / len(flat)
    std = math.sqrt(math.fsum((a - mean) ** 2 for a in flat) / len(flat))
    kl = math.fsum(float((o - r).sum()) for o, r in zip(old, refs, strict=True)) / 6
    assert numbers["objective/kl"] == pytest.approx(kl, abs=1e-4)

    shift(policy, 0.02, 7)  # so that ratios leave 1, some by more than the bound
    shift(critic, 0.02, 8)
    network = doubled(policy, base)
    loss: Any = 0.0
    beyond = 0
    for o, n, row in zip(old, oracle(network, None, groups, ids), advantages, strict=True):
        for t, a in enumerate(row):
            white, ratio = (a - mean) / std, (n[t] - o[t]).exp()
            bounded = min(max(float(ratio.detach()), 0.95), 1.05)
            beyond += -white * bounded > -white * float(ratio)
            loss = loss + (-white * ratio if -white * float(ratio) >= -white * bounded else -white * bounded)
    (loss / len(flat)).backward()
    got = gradients(policy)
    metrics = policy.update(rollouts, PolicyGradient.of(rollouts, clip=cfg.clip))
    assert 0 < beyond < len(flat)
    assert metrics["policy/clipfrac_avg"] == pytest.approx(beyond / len(flat), abs=1e-6)
    expected = {name: p.grad for name, p in network.named_parameters()}
    for (name, _), gradient in zip(policy.model.trained(), got, strict=True):
        wanted = expected[name]
        assert wanted is not None
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-6, rtol=1e-4)

    trunk = doubled(critic, base)
    head = critic.model.network.score.weight[0].double().detach().requires_grad_()
    loss = 0.0
    for v, n, row in zip(values, oracle(trunk, head, groups, ids), advantages, strict=True):
        for t, a in enumerate(row):
            target = a + v[t]
            near = v[t] + min(max(float(n[t] - v[t]), -0.1), 0.1)
            loss = loss + 0.5 * (
                (n[t] - target) ** 2 if (n[t] - target) ** 2 >= (near - target) ** 2 else (near - target) ** 2
            )
    (loss / len(flat)).backward()
    got = gradients(critic)
    critic.update(rollouts, ValueRegression.of(rollouts, clip=cfg.value_clip))
    expected = {name: p.grad for name, p in trunk.named_parameters()} | {"score.weight": head.grad[None]}
    for (name, _), gradient in zip(critic.model.trained(), got, strict=True):
        wanted = expected[name]
        assert wanted is not None
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-6, rtol=1e-4)


def test_texts_to_keep_likely_add_their_own_gradient(config: Callable[..., RLHFConfig]) -> None:
    cfg = config(batch_size=2)
    policy, _ = learners(cfg)
    codec = policy.model.codec
    texts = [
        Example(p, codec.completion(p, "yes" * (i + 1))) for i, p in enumerate([Prompt("a"), Prompt("b")])
    ]
    groups = scored(lambda ids: ids[0] / 100)(
        policy.snapshot().sample([Prompt("q"), Prompt("r")], 1, cfg.sampling, seed=1)
    )
    with Run(cfg, method="rlhf") as run:
        rollouts, _ = loops.roll_out(
            policy, None, policy.snapshot(), groups, cfg, run, step=0, beta=0.1, centre=0.0
        )
    together, alone, only = gradients(policy), None, None
    metrics = policy.update(
        [*rollouts, *texts], PolicyGradient.of([*rollouts, *texts], clip=0.2, pretrain_coef=0.7)
    )
    alone = gradients(policy)
    policy.update(rollouts, PolicyGradient.of(rollouts, clip=0.2))
    only = gradients(policy)
    found = policy.update(texts, palate.Likelihood.per_token(texts))
    for whole, one, other in zip(together, alone, only, strict=True):
        torch.testing.assert_close(whole, one + 0.7 * other, atol=1e-6, rtol=1e-4)
    assert metrics["policy/approxkl_avg"] == pytest.approx(0, abs=1e-6)
    assert metrics["nll_loss"] == pytest.approx(-found["logps/training"], rel=0.2)


# ---- Tasks with a known optimum ----------------------------------------------------------------------


def taught(
    cfg: RLHFConfig, score: Callable[[tuple[int, ...]], float | None]
) -> tuple[Policy, list[dict[str, Any]]]:
    policy, critic = learners(cfg)
    with Run(cfg, method="rlhf") as run:
        rlhf(policy, scored(score), [Prompt("q")], cfg, run, critic)
    lines = (run.directory / "metrics.jsonl").read_text().splitlines()
    return policy, [json.loads(line) for line in lines]


def mass(policy: Policy) -> float:
    """Probability that the first token is one of the first half of the vocabulary."""
    ids = torch.tensor([policy.model.codec.prompt_ids(Prompt("q"))])
    with torch.no_grad():
        return float(policy.model.network(ids).logits[0, -1].softmax(-1)[:80].sum())


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo"])
def test_a_bandit_comes_to_its_optimum(config: Callable[..., RLHFConfig], estimator: str) -> None:
    # One token, reward 1 for a part of the vocabulary. With a price of KL, the best policy is known:
    # π*(y) ∝ π_ref(y) exp(r(y) / β), so the rewarded mass p becomes p e^(1/β) / (p e^(1/β) + 1 - p).
    cfg = config(
        estimator=estimator, n=64, batch_size=1, steps=40, max_new_tokens=1, beta=0.5, lr=3e-3,
        value_lr=1e-2 if estimator == "gae" else None, schedule="linear", centre_on="none",
        missing_eos_penalty=0,
    )  # fmt: skip
    cfg = cfg.model_copy(update={"ppo_epochs": min(cfg.ppo_epochs, 2)})
    p = mass(Policy.load(cfg, total_steps=1))
    best = p * math.exp(2) / (p * math.exp(2) + 1 - p)
    assert best > p + 0.2
    policy, _ = taught(cfg, lambda ids: float(ids[0] < 80))
    assert mass(policy) == pytest.approx(best, abs=0.1)


def test_two_tokens_are_learnt_together(config: Callable[..., RLHFConfig]) -> None:
    # The second token pays, and what pays depends on the first one: the optimum is a reward of 1.
    cfg = config(n=64, batch_size=1, steps=30, ppo_epochs=2, max_new_tokens=2, beta=0, missing_eos_penalty=0)
    _, rows = taught(cfg, lambda ids: float(len(ids) == 2 and (ids[0] < 128) == (ids[1] < 128)))
    scores = [row["objective/scores"] for row in rows if "objective/scores" in row]
    assert scores[0] < 0.7
    assert sum(scores[-5:]) / 5 > 0.9
    assert rows[-1]["val/explained_variance"] <= 1


# ---- The run -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_the_first_optimizer_step_begins_with_ratios_of_exactly_one(
    config: Callable[..., RLHFConfig], lora: bool, fast: bool
) -> None:
    cfg = config(lora=lora, fast=fast, ppo_epochs=1, steps=2, batch_size=8, n=2, micro_batch_tokens=40)
    _, rows = taught(cfg, lambda ids: float(ids[0]))
    first, second = (row for row in rows if "loss" in row)
    for row in (first, second):
        assert row["policy/approxkl_avg"] == 0
        assert row["policy/clipfrac_avg"] == 0
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)  # a mean of ones
    assert first["objective/kl"] == first["objective/kl_k3"] == 0
    assert second["objective/kl_k3"] > 0


def test_several_passes_in_mini_batches(config: Callable[..., RLHFConfig]) -> None:
    cfg = config(ppo_epochs=3, mini_batches=2, steps=2, batch_size=4, schedule="linear", lr=1e-2)
    policy, rows = taught(cfg, lambda ids: float(ids[0]))
    assert policy.version == 12
    steps = [row for row in rows if "loss" in row]
    assert [row["learning_rate"] for row in steps] == pytest.approx([1e-2 * 7 / 12, 1e-2 / 12])
    assert [row["value/learning_rate"] for row in steps] == pytest.approx([3e-2 * 7 / 12, 3e-2 / 12])
    assert steps[0]["policy/approxkl_avg"] > 0


def test_a_warm_up_of_the_value_function_leaves_the_policy_its_whole_schedule(
    config: Callable[..., RLHFConfig],
) -> None:
    cfg = config(value_warmup=1, ppo_epochs=2, steps=3, batch_size=2, schedule="linear", lr=1e-2)
    policy, rows = taught(cfg, lambda ids: float(ids[0]))
    assert policy.version == 4
    first, *others = (row for row in rows if "loss/value_avg" in row)
    assert "learning_rate" not in first
    assert [row["learning_rate"] for row in others] == pytest.approx([1e-2 * 3 / 4, 1e-2 / 4])
    rates = [row["value/learning_rate"] for row in (first, *others)]
    assert rates == pytest.approx([3e-2 * 5 / 6, 3e-2 * 3 / 6, 3e-2 / 6])


def test_completions_without_a_reward_take_no_part_and_are_counted(config: Callable[..., RLHFConfig]) -> None:
    _, rows = taught(
        config(n=8, batch_size=1, steps=1, centre_on="none"), lambda ids: None if ids[0] % 2 else 0.0
    )
    (row,) = (row for row in rows if "loss" in row)
    assert row["rollouts/dropped"] == row["objective/unusable"] > 0
    assert row["rollouts/kept"] + row["rollouts/dropped"] == 8
    with pytest.raises(palate.RunError, match="no completion with a usable reward in 2 steps in a row"):
        taught(config(n=4, batch_size=1, max_dead_steps=2, centre_on="none"), lambda ids: None)


def test_the_price_of_kl_follows_its_target(config: Callable[..., RLHFConfig]) -> None:
    cfg = config(kl_target=1e-3, kl_horizon=10, batch_size=4, steps=3, beta=0.1)
    _, rows = taught(cfg, lambda ids: float(ids[0]))
    steps = [row for row in rows if "loss" in row]
    assert steps[0]["beta"] == 0.1
    for before, row in pairwise(steps):
        error = min(max(before["objective/kl"] / 1e-3 - 1, -0.2), 0.2)
        assert row["beta"] == before["beta"] * (1 + error * 4 / 10)


def test_the_mean_reward_of_the_start_is_taken_off(config: Callable[..., RLHFConfig]) -> None:
    _, rows = taught(config(steps=1, batch_size=4), lambda ids: 100.0)
    (row,) = (row for row in rows if "loss" in row)
    assert (row["objective/scores"], row["objective/centred_scores"]) == (100, 0)
    assert row["objective/rlhf_reward"] == 0


def test_rloo_needs_no_mean_reward_of_the_start(config: Callable[..., RLHFConfig]) -> None:
    def compared(groups: Sequence[Group]) -> list[Group]:
        """Rank the completions of a prompt, as a ranker does, which says nothing about a single one."""
        assert all(len(group.completions) > 1 for group in groups)
        return scored(lambda ids: float(ids[0]))(groups)

    cfg = config(estimator="rloo", steps=1, batch_size=2)
    policy, _ = learners(cfg)
    with Run(cfg, method="rlhf") as run:
        rlhf(policy, compared, [Prompt("q")], cfg, run)
    (row,) = map(json.loads, (run.directory / "metrics.jsonl").read_text().splitlines())
    assert row["rollouts/kept"] == 8
    assert row["objective/centred_scores"] == row["objective/scores"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "temperature is 0.7, expected 1.0"),
        ({"top_p": 0.9}, "top_p is 0.9, expected 1.0"),
        ({"estimator": "rloo", "n": 1}, "n is 1, but rloo compares"),
        ({"estimator": "reinforce", "ppo_epochs": 2}, "only correct for one optimizer step"),
        ({"batch_size": 2, "n": 4, "mini_batches": 4}, "mini_batches is 4, but a rollout phase has only 2"),
        ({"reward": "ranker:x"}, "use --estimator rloo, or a reward that scores"),
        ({"estimator": "rloo", "value_model": "x"}, "has no value function"),
        ({"estimator": "rloo", "gamma": 0.9}, "gamma is 0.9, but the estimator rloo does not discount"),
        ({"estimator": "rloo", "centre_on": "start"}, "so that a mean cancels out"),
        ({"estimator": "reinforce", "lam": 0.9}, "lam is 0.9, but the estimator reinforce has no value"),
        ({"estimator": "reinforce", "clip": 0.1}, "has no clipped loss"),
        ({"steps": 3, "value_warmup": 3}, "value_warmup is 3, but there are only 3 rollout phases"),
        ({"kl_horizon": 5}, "kl_horizon is 5, but there is no kl_target"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RLHFConfig.model_validate({"data": "-", **options})


def test_the_warm_up_is_shorter_than_the_optimizer_steps() -> None:
    given = {"data": "-", "steps": 5, "ppo_epochs": 2, "mini_batches": 4}
    assert RLHFConfig.model_validate({**given, "warmup_steps": 39}).schedule_steps == 40
    with pytest.raises(ValidationError, match="warmup_steps is 40, but there are only 40 steps"):
        RLHFConfig.model_validate({**given, "warmup_steps": 40})


def test_defaults_follow_the_estimator() -> None:
    made = [RLHFConfig.model_validate({"data": "-", "estimator": e}) for e in ("gae", "reinforce", "rloo")]
    assert [(c.n, c.ppo_epochs, c.whiten) for c in made] == [(1, 4, True), (1, 1, True), (4, 1, False)]

    assert [c.compares_rewards is None for c in made] == [False, False, True]
    short, long = (RLHFConfig.model_validate({"data": "-", "max_new_tokens": n}) for n in (64, 65))
    assert (short.lam, long.lam) == (0.95, 1.0)
    for cfg in (*made, short, long):  # a whole configuration can be given again
        assert RLHFConfig.model_validate(cfg.model_dump()) == cfg


# ---- Two learners ------------------------------------------------------------------------------------


class Unplugged(palate.Display):
    """Ends a run when some work has been done for so many times."""

    def __init__(self, moment: str, count: int) -> None:
        super().__init__(quiet=True)
        self.moment, self.count = moment, count

    def working(self, stage: str, speed: float) -> None:
        self.count -= stage == self.moment
        if self.count == 0:
            raise KeyboardInterrupt
        super().working(stage, speed)


@pytest.fixture
def files(tiny: str, tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": f"question {i}", "completion": f"yes {i}"} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": row["prompt"]} for row in rows]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return FIXED | {
        "model": tiny, "data": str(tmp_path / "prompts.jsonl"), "reward": "length:3", "steps": 3,
        "batch_size": 4, "lora_rank": 2, "pretrain_batch_size": 2,
        "pretrain_data": str(tmp_path / "rows.jsonl"), "centre_on": str(tmp_path / "rows.jsonl"),
        "ppo_epochs": 2, "mini_batches": 2, "kl_target": 0.5, "kl_horizon": 20, "checkpoint_every": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("moment", "count", "lora"),
    [("sample", 9, True), ("annotate", 3, False), ("learn", 14, True), ("learn", 27, False)],
)
def test_a_run_that_was_cut_off_ends_in_the_same_two_learners(
    files: dict[str, Any], tmp_path: Path, moment: str, count: int, lora: bool
) -> None:
    def train(name: str, display: palate.Display | None = None) -> palate.Outcome:
        cfg = METHODS["rlhf"].configure({**files, "lora": lora, "output": tmp_path / name})
        return palate.train("rlhf", cfg, display=display)

    whole = train("whole")
    assert (whole.summary["steps"], whole.summary["updates"]) == (3, 12)
    with pytest.raises(KeyboardInterrupt):
        train("cut", Unplugged(moment, count))
    resumed = train("cut")
    one, other = (o.run.directory / "checkpoints" / "step-3" for o in (whole, resumed))
    states = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert sorted({path.parent.name for path in states}) == ["", "critic"]
    for path in states:
        assert (one / path).read_bytes() == (other / path).read_bytes()


def test_a_run_that_is_killed_ends_in_the_same_two_learners(
    soak: ModuleType, files: dict[str, Any], tmp_path: Path
) -> None:
    kept = {**files, "device": "cpu", "threads": 1, "steps": 2, "lora": True, "fresh_prompts": 0}
    named = {name.replace("_", "-"): value for name, value in kept.items() if name != "lora"}
    command = ["run", "rlhf", *(text for name, value in named.items() for text in (f"--{name}", str(value)))]
    whole = soak.Trial(tmp_path, "whole", command)
    ended = whole.start()
    assert ended.returncode == 0, ended.stderr
    trial = soak.Trial(tmp_path, "killed", command)
    kills = (
        "sample:1:0",  # of the first phase
        "journal:2:0",
        "learn:2:0",  # the value function has learnt, the policy has not
        "learn:7:0",  # in the last mini-batches of a phase
        "checkpoint:1:0",
    )
    for kill in kills:
        ended = trial.start(kill=kill)
        assert ended.returncode == -signal.SIGKILL, (kill, ended.stderr)
    ended = trial.start()
    assert ended.returncode == 0, ended.stderr
    weights = trial.weights()
    assert weights == whole.weights()
    assert {Path(name).parent.as_posix() for name in weights} == {".", "critic"}


# ---- A judge -----------------------------------------------------------------------------------------


def score_reply(body: dict[str, Any], number: int) -> dict[str, Any]:
    """Give probabilities .8 and .2 to two neighbouring numbers, which depend on the question."""
    low = sum(body["messages"][0]["content"].encode()) % 9 + 1
    tops = [
        {"token": str(i), "logprob": math.log({low: 0.8, low + 1: 0.2}.get(i, 1e-9))} for i in range(1, 11)
    ]
    place = {"token": str(low), "logprob": math.log(0.8), "top_logprobs": tops}
    choice = {"message": {"content": str(low)}, "finish_reason": "length", "logprobs": {"content": [place]}}
    return {"model": "m", "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}


def test_a_judge_scores_each_completion(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    with FaultyServer(score_reply) as server:
        options = {
            **files, "reward": (), "judge": f"server:m@{server.url}", "price_in": 1, "price_out": 1,
            "centre_on": "start", "missing_eos_penalty": 0, "output": tmp_path / "judged",
        }  # fmt: skip
        outcome = palate.train("rlhf", METHODS["rlhf"].configure(options))
        assert set(server.delivered.values()) == {1}
    lines = (outcome.directory / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if "loss" in row]
    assert len(rows) == 3
    # The expectation of a number from 1 to 10, on a scale from -1 to 1.
    possible = [(low + 0.2 - 5.5) / 4.5 for low in range(1, 10)]
    journal = palate.Journal(outcome.directory / "journal.db")
    given = [row["reward"] for row in journal.table() if row["reward"] is not None]
    journal.close()
    assert len(given) >= 12
    for reward in given:
        assert min(abs(reward - value) for value in possible) < 1e-6
    assert outcome.summary["judge_verdicts"] == len(server.delivered)


@pytest.mark.parametrize(("estimator", "compares"), [("gae", False), ("reinforce", False), ("rloo", True)])
def test_a_judge_compares_completions_of_a_prompt_for_rloo_only(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str, compares: bool
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")

    def answer(body: dict[str, Any], number: int) -> dict[str, Any]:
        pairwise = "[answer " in body["messages"][0]["content"] and "whole number" not in str(body)
        assert pairwise == compares
        return judge_reply(body, lambda first, second: 0.9) if pairwise else score_reply(body, number)

    with FaultyServer(answer) as server:
        options = {
            **files, "reward": (), "judge": f"server:m@{server.url}", "price_in": 1, "price_out": 1,
            "centre_on": None, "estimator": estimator, "ppo_epochs": 1, "mini_batches": 1,
            "missing_eos_penalty": 0, "steps": 1, "output": tmp_path / "judged",
        }  # fmt: skip
        outcome = palate.train("rlhf", METHODS["rlhf"].configure(options))
    (row,) = (
        row
        for row in map(json.loads, (outcome.directory / "metrics.jsonl").read_text().splitlines())
        if "loss" in row
    )
    assert row["rollouts/kept"] > 0
    if compares:  # the judge always prefers the first place, so both orders cancel out
        assert row["objective/scores"] == pytest.approx(0.5)
        assert row["judge/orders_disagree"] == 1


def test_with_lora_the_value_function_shares_the_base(config: Callable[..., RLHFConfig]) -> None:
    policy, critic = learners(config(lora=True, lora_rank=2))
    assert critic is not None
    base = sum(p.numel() * 4 for p in policy.model.network.parameters() if not p.requires_grad)
    added = sum(p.numel() * 4 for model in (policy.model, critic.model) for _, p in model.trained())
    assert weight_bytes(policy.model, critic.model) == base + added + 32 * 4  # the head's first copy
    groups = scored(lambda ids: 1.0)(policy.snapshot().sample([Prompt("q")], 2, config().sampling, seed=0))
    before = {name: p.detach().clone() for name, p in policy.model.trained()}
    with Run(config(), method="rlhf") as run:
        rollouts, _ = loops.roll_out(
            policy, critic, policy.snapshot(), groups, config(), run, step=0, beta=0.1, centre=0.0
        )
    critic.update(rollouts, ValueRegression.of(rollouts, clip=None))
    assert all(torch.equal(before[name], p) for name, p in policy.model.trained())


def test_the_value_function_starts_from_the_reward_model(tiny: str, tmp_path: Path) -> None:
    reward = Learner.load(
        LearnerConfig.model_validate(
            {"model": tiny, "dtype": "float32", "device": "cpu", "lora_rank": 2, "lr": 1e-2}
        ),
        total_steps=1,
        head="scalar",
    )
    shift(reward, 0.1, 3)
    reward.save(tmp_path / "reward")
    cfg = RLHFConfig.model_validate({**FIXED, "model": tiny, "reward": f"model:{tmp_path / 'reward'}"})
    _, critic = learners(cfg)
    assert critic is not None
    prompt = Prompt("q")
    record = Example(prompt, critic.model.codec.completion(prompt, "yes"))
    longer = replace(
        record, completion=replace(record.completion, token_ids=(*record.completion.token_ids, 65))
    )
    last = critic.values([longer]).rows()[0][-1]
    torch.testing.assert_close(last, reward.scores([record])[0], atol=1e-5, rtol=0)
