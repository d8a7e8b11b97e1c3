from __future__ import annotations

import json
import math
import signal
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import palate
from palate import loops
from palate.annotate import Annotator, judged, scored
from palate.config import Sampling
from palate.learn import Learner, Policy, SoftRanking
from palate.methods import METHODS
from palate.methods.rlaif import RLAIFConfig, load_learners
from palate.run import Run
from palate.testing import FaultyServer, ScriptedJudge, ScriptedScorer, judge_reply
from palate.types import Completion, Group, LabelledPair, Prompt

FIXED = {"data": "-", "dtype": "float32", "device": "cpu", "lora": False, "lr": 3e-3, "max_new_tokens": 5}
WANTED = frozenset(string.ascii_letters + string.digits)


def share(text: str) -> float:
    return sum(c in WANTED for c in text) / max(1, len(text))


def prefer(first: str, second: str) -> float:
    """A judge that likes letters and digits, and the first place a little."""
    return 1 / (1 + math.exp(-8 * (share(first) - share(second)) - 0.5))


@pytest.fixture
def config(base: str, tmp_path: Path) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        output = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return METHODS["rlaif"].configure({**FIXED, "model": base, "output": output, **options})

    return make


def rows_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]


def train(cfg: Any, annotate: Annotator, prompts: Sequence[Prompt]) -> tuple[Policy, list[Learner], Run]:
    method = METHODS["rlaif"]
    with Run(cfg, method="rlaif") as run:
        policy = Policy.load(cfg, total_steps=1, seed=run.seed("adapter"))
        beside = list(load_learners(policy, cfg, seed=0))
        method.way_of(cfg).train(policy, annotate, prompts, cfg, run, *beside)
    return policy, beside, run


def said(policy: Policy, most: int) -> float:
    """The mean share of letters in fresh samples of `most` tokens."""
    prompts = [Prompt(f"q{i}") for i in range(16)]
    groups = policy.snapshot().sample(prompts, 32, Sampling(max_new_tokens=most), seed=99)
    return fmean(share(c.text) for group in groups for c in group.completions)


# ---- It learns ---------------------------------------------------------------------------------------


def test_it_learns_what_the_judge_likes(config: Callable[..., Any]) -> None:
    # One token, since the reward model must have seen most tokens: embeddings of a random model are random.
    cfg = config(
        steps=12, batch_size=32, max_new_tokens=1, candidates=4, reward_lr=5e-3, reward_batch_size=32,
        preference_held_out=0.2, beta=0.01, missing_eos_penalty=0, ppo_epochs=2, lr=5e-3, value_lr=1e-2,
    )  # fmt: skip
    before = said(Policy.load(cfg, total_steps=1), 1)
    prompts = [Prompt(f"q{i}") for i in range(200)]
    policy, (reward, _), run = train(cfg, judged(ScriptedJudge(prefer)), prompts)
    assert said(policy, 1) > before + 0.1
    rows = rows_of(run)
    agreed = [row["eval_reward_model/accuracy"] for row in rows if "eval_reward_model/accuracy" in row]
    assert len(agreed) == 2
    assert agreed[1] > 0.7
    first = [row["step"] for row in rows if "reward_model/loss" in row]
    then = [row for row in rows if "loss" in row]
    assert max(first) < min(row["step"] for row in then)  # the reward model learns first, then the policy
    scores = [row["objective/scores"] for row in then]
    assert fmean(scores[-4:]) > fmean(scores[:4])
    assert reward.version == run.step_count - 12


def test_the_direct_variant_learns_from_scores(config: Callable[..., Any]) -> None:
    cfg = config(
        variant="d-rlaif", steps=12, batch_size=16, max_new_tokens=8, beta=0.01, missing_eos_penalty=0,
        ppo_epochs=2, lr=5e-3,
    )  # fmt: skip
    before = said(Policy.load(cfg, total_steps=1), 8)
    scores = scored(ScriptedScorer(lambda text: 2 * share(text) - 1))
    policy, learners, run = train(cfg, scores, [Prompt(f"q{i}") for i in range(24)])
    assert [learner.name for learner in learners] == ["critic"]  # and no reward model
    assert said(policy, 8) > before + 0.1
    assert not any("reward_model/loss" in row for row in rows_of(run))


# ---- Labels ------------------------------------------------------------------------------------------


def test_soft_labels_reach_the_loss_as_the_judge_gave_them(
    config: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, str], float] = {}
    plain = SoftRanking.__call__

    def spied(self: SoftRanking, outputs: Any, records: Sequence[LabelledPair]) -> Any:
        loss, numbers = plain(self, outputs, records)
        if torch.is_grad_enabled():
            gap = outputs.scores.detach().double().view(-1, 2)
            for pair, own, (a, b) in zip(records, loss.tolist(), gap.tolist(), strict=True):
                seen[pair.first.text, pair.second.text] = pair.p
                right = -pair.p * math.log(1 / (1 + math.exp(b - a))) - (1 - pair.p) * math.log(
                    1 / (1 + math.exp(a - b))
                )
                assert own == pytest.approx(right, abs=1e-5)
        return loss, numbers

    monkeypatch.setattr(SoftRanking, "__call__", spied)
    train(config(steps=1, batch_size=2), judged(ScriptedJudge(prefer)), [Prompt(f"q{i}") for i in range(8)])
    assert len(seen) > 5
    for (first, second), p in seen.items():
        assert p == (prefer(first, second) + 1 - prefer(second, first)) / 2  # to the last bit
        assert 0 < p < 1


def group(*rewards: float | None) -> Group:
    prompt = Prompt("q")
    return Group(prompt, (Completion("a", (65,)), Completion("b", (66,))), rewards)


def test_a_label_is_a_probability_or_log_odds() -> None:
    label = loops.soft_label(group(0.7, 0.3), odds=False)
    assert label is not None
    assert (label.first.text, label.second.text, label.p) == ("a", "b", 0.7)
    assert loops.soft_label(group(None, 0.3), odds=False) is None
    label = loops.soft_label(group(1.5, 0.5), odds=True)
    assert label is not None
    assert label.p == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-15)
    with pytest.raises(palate.RunError, match=r"gave 2 and 0\.5 to two completions; expected probabilities"):
        loops.soft_label(group(2.0, 0.5), odds=False)


def test_the_objective_is_the_cross_entropy_and_its_minimum_is_the_entropy() -> None:
    pairs = [LabelledPair(Prompt("q"), *group().completions, p) for p in (0.25, 0.5, 1.0)]
    scores = torch.tensor([math.log(0.25), math.log(0.75), 1.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    loss, numbers = SoftRanking()(palate.model.Outputs(scores=scores), pairs)  # type: ignore[attr-defined]
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert loss.tolist() == pytest.approx([entropy, math.log(2), math.log1p(math.exp(3))], abs=1e-12)
    assert numbers["divergence"].tolist() == pytest.approx([0, 0, math.log1p(math.exp(3))], abs=1e-12)
    accuracy, margin = numbers["accuracy"].tolist(), numbers["margin"].tolist()
    assert (accuracy[0], accuracy[2]) == (1, 0)
    assert (margin[0], margin[2]) == pytest.approx((math.log(3), -3))
    assert math.isnan(accuracy[1])
    assert math.isnan(margin[1])


def test_pairs_without_a_verdict_are_counted(config: Callable[..., Any]) -> None:
    def fussy(first: str, second: str) -> float | None:
        return None if first[0] < "M" or second[0] < "M" else prefer(first, second)

    prompts = [Prompt(f"q{i}") for i in range(12)]
    cfg = config(steps=1, candidates=3, batch_size=2, preference_prompts=10, preference_held_out=0.2)
    _, _, run = train(cfg, judged(ScriptedJudge(fussy)), prompts)
    row = next(row for row in rows_of(run) if "preferences/kept" in row)
    assert row["preferences/kept"] + row["preferences/dropped"] == 10 * 3
    assert row["preferences/dropped"] > 0
    assert 0 < row["preferences/confidence"] <= 0.5
    with pytest.raises(palate.RunError, match=r"none of \d+ comparisons has a usable verdict"):
        train(config(steps=1), judged(ScriptedJudge(lambda first, second: None)), prompts)


def test_completions_from_data(config: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "." * (i + 1), "rejected": "yes" + "s" * i} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = config(steps=1, pairs=str(tmp_path / "pairs.jsonl"), preference_held_out=0, reward_steps=2)
    asked: list[tuple[str, str]] = []

    def judge(first: str, second: str) -> float:
        asked.append((first, second))
        return prefer(first, second)

    train(cfg, judged(ScriptedJudge(judge)), [Prompt("p")])
    assert sorted(asked) == sorted(
        two for row in rows for two in ((row["chosen"], row["rejected"]), (row["rejected"], row["chosen"]))
    )


# ---- A whole run -------------------------------------------------------------------------------------


def test_a_run_leaves_its_policy_its_reward_model_and_a_report(tiny: str, tmp_path: Path) -> None:
    outcome = palate.train(
        "rlaif", model=tiny, data=[{"prompt": f"question {i}"} for i in range(8)],
        eval_data=[{"prompt": f"other {i}"} for i in range(3)], judge=ScriptedJudge(prefer), steps=2,
        batch_size=4, ppo_epochs=2, lora_rank=2, max_new_tokens=6, reward_steps=3, preference_held_out=0.25,
        dtype="float32", device="cpu", output=tmp_path / "run", display=None,
    )  # fmt: skip
    summary = outcome.summary
    assert (summary["steps"], summary["updates"], summary["compared"]) == (5, 4, 3)
    assert 0 <= summary["reward_accuracy_before"] <= 1
    assert 0 <= summary["reward_accuracy_after"] <= 1
    # The judge compares before and after, so the two rewards of a prompt add up to 1.
    assert summary["reward_before"] + summary["reward_after"] == pytest.approx(1)
    assert "Agreement of the reward model with the judge" in outcome.report.read_text(encoding="utf-8")
    reward = palate.RewardModel.load(str(outcome.checkpoint / "reward"), device="cpu")
    (score,) = reward([Prompt("q")], [Completion("yes", (65,))])
    assert score is not None
    assert math.isfinite(score)
    assert palate.train("rlaif", cfg=None, **_again(tiny, tmp_path)).summary["method"] == "rlaif"


def _again(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """A second run whose reward is the first run's reward model."""
    return {
        "model": tiny, "data": [{"prompt": f"question {i}"} for i in range(4)], "steps": 1, "batch_size": 2,
        "reward": f"model:{tmp_path / 'run' / 'checkpoints' / 'step-5' / 'reward'}", "reward_steps": 1,
        "lora_rank": 2, "max_new_tokens": 6, "dtype": "float32", "device": "cpu", "display": None,
        "output": tmp_path / "again",
    }  # fmt: skip


# ---- Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "self", "judge_mode": "score"}, "use pairwise, or the variant d-rlaif"),
        ({"pairs": "x.jsonl", "candidates": 3}, "candidates is 3, but the completions come from pairs"),
        ({"variant": "d-rlaif", "reward": "length:3"}, "d-rlaif learns from a judge's scores"),
        ({"variant": "d-rlaif", "judge": "self", "judge_mode": "rubric"}, "is a score from 1 to 10"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        METHODS["rlaif"].configure({"data": "-", **options})


@pytest.mark.parametrize("estimator", [{}, {"estimator": "rloo", "n": 2}])
def test_noisy_labels_are_shares_of_won_comparisons(estimator: dict[str, Any]) -> None:
    options = {"data": "-", "reward": "length:3", **estimator}
    plain: Any = METHODS["rlaif"].configure(options)
    noisy: Any = METHODS["rlaif"].configure({**options, "label_noise": 0.2})
    assert (loops.gives_odds(plain), loops.gives_odds(noisy)) == (True, False)
    with pytest.raises(ValidationError, match="no comparisons to swap"):
        METHODS["rlaif"].configure({"data": "-", "variant": "d-rlaif", "judge": "self", "label_noise": 0.2})


def test_options_of_the_reward_model_have_no_effect_without_one() -> None:
    with pytest.raises(palate.ConfigError, match="candidates would have no effect"):
        METHODS["rlaif"].configure({"data": "-", "variant": "d-rlaif", "candidates": 4})


def test_the_penalty_is_no_part_of_a_preference() -> None:
    cfg = RLAIFConfig.model_validate({"data": "-"})
    assert (cfg.missing_eos_penalty, cfg.annotator_penalty) == (1.0, 0.0)
    direct: Any = METHODS["rlaif"].configure({"data": "-", "variant": "d-rlaif"})
    assert direct.annotator_penalty == 1.0
    assert [RLAIFConfig.model_validate({"data": "-", "lora": on}).reward_lr for on in (True, False)] == [
        2e-4,
        1e-5,
    ]


def test_with_lora_the_reward_model_shares_the_base(config: Callable[..., Any]) -> None:
    cfg = config(lora=True, lora_rank=2)
    policy = Policy.load(cfg, total_steps=1)
    reward, critic = load_learners(policy, cfg, seed=0)
    base = sum(p.numel() * 4 for p in policy.model.network.parameters() if not p.requires_grad)
    models = [policy.model, reward.model, critic.model]
    added = sum(p.numel() * 4 for model in models for _, p in model.trained())
    assert palate.model.weight_bytes(*models) == base + added + 2 * 32 * 4  # type: ignore[attr-defined]


# ---- Killed processes --------------------------------------------------------------------------------


def test_a_run_that_is_killed_in_any_stage_ends_as_if_it_had_not_been(
    soak: ModuleType, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    prompts = [{"prompt": f"question {i}"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    with FaultyServer(lambda body, number: judge_reply(body, prefer)) as server:
        command = [
            "run", "rlaif", "--model", tiny, "--data", str(tmp_path / "prompts.jsonl"), "--judge",
            f"server:m@{server.url}", "--price-in", "1", "--price-out", "1", "--judge-concurrency", "1",
            "--probe-pairs", "0",
            "--dtype", "float32", "--device", "cpu", "--threads", "1", "--lora-rank", "2",
            "--max-new-tokens", "6", "--steps", "2", "--batch-size", "4", "--reward-steps", "3",
            "--preference-held-out", "0.4", "--ppo-epochs", "1", "--fresh-prompts", "0",
            "--centre-prompts", "2", "--checkpoint-every", "1",
        ]  # fmt: skip
        whole = soak.Trial(tmp_path, "whole", command)
        ended = whole.start()
        assert ended.returncode == 0, ended.stderr
        verdicts = sum(server.delivered.values())
        assert set(server.delivered.values()) == {1}
        assert verdicts == 12  # two orders of six pairs, and none for the reward model's rewards

        trial = soak.Trial(tmp_path, "killed", command)
        stages = (
            "sample:1:0",  # the completions to compare
            "judge:5:0",
            "evaluate:1:0",  # the reward model before it learns
            "learn:2:0",  # the reward model's first optimizer step is done
            "checkpoint:2:0",  # the last one of its stage
            "learn:3:0",  # a phase of the policy: the value function has learnt, the policy has not
        )
        for kill in stages:
            ended = trial.start(kill=kill)
            assert ended.returncode == -signal.SIGKILL, (kill, ended.stderr)
        ended = trial.start()
        assert ended.returncode == 0, ended.stderr
    # One process was killed while the judge answered; at most the question in flight is paid again.
    assert verdicts <= sum(server.delivered.values()) - verdicts <= verdicts + 1
    assert max(server.delivered.values()) <= 3
    weights = trial.weights()
    assert weights == whole.weights()
    places = {Path(name).parent.as_posix() for name in weights}
    assert places == {".", "reward", "critic"}
