from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

import palate
from palate import launch
from palate.config import MethodConfig, RewardConfig
from palate.errors import DataError, ModelError, RunError
from palate.journal import Journal
from palate.launch.measure import drawn_prompts
from palate.learn import Learner, Likelihood, Policy, Ranking
from palate.loops import OfflineConfig, PairBatches, fit, read_pairs
from palate.method import Method, Recipe, Way
from palate.model import load, rollouts
from palate.run import Run, directory
from palate.types import Example, Pair, Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

RECIPE = Recipe("none", "data", "once", ("policy",))
TEXTS = "def length(completions, **_):\n    return [float(len(str(c))) for c in completions]\n"
ROWS = {
    "pairs": [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": f"no {i * i}"} for i in range(6)],
    "demonstrations": [{"prompt": f"q{i}", "completion": f"yes {i}"} for i in range(6)],
    "prompts": [{"prompt": f"q{i}"} for i in range(6)],
}


class ToyConfig(OfflineConfig, PairBatches):
    """Numbers of toys."""


class SampledConfig(ToyConfig):
    """Numbers of one way of a toy."""

    variant: Literal["sampled"] = "sampled"
    """The way."""


class DirectConfig(ToyConfig):
    """Numbers of its other way."""

    variant: Literal["direct"] = "direct"
    """The way."""


class ScoringConfig(MethodConfig, PairBatches):
    """Numbers of a toy that has nothing to do with rewards and sampling."""


def learn(
    policy: Policy, records: Sequence[Any], cfg: Any, run: Run, *, held_out: Sequence[Any] = ()
) -> None:
    examples, unseen = ([Example(r.prompt, r.completions[0]) for r in part] for part in (records, held_out))
    fit(policy, examples, lambda batch, _: Likelihood.per_token(batch), cfg, run, unseen)


def sampled(policy: Policy, annotate: Any, prompts: Sequence[Prompt], cfg: Any, run: Run) -> None:
    groups = policy.snapshot().sample(prompts, 1, cfg.sampling, seed=0)
    learn(policy, [Example(g.prompt, g.completions[0]) for g in annotate(groups)], cfg, run)


def ranked(
    learner: Learner, pairs: Sequence[Pair], cfg: Any, run: Run, *, held_out: Sequence[Pair] = ()
) -> None:
    fit(learner, pairs, lambda *_: Ranking(), cfg, run, held_out)


def scalar(cfg: Any, *, total_steps: int, seed: int) -> Learner:
    return Learner.load(cfg, total_steps=total_steps, seed=seed, head="scalar")


def method(train: Callable[..., None], learns_from: Any, **more: Any) -> Method:
    fixed: dict[str, Any] = {
        "config": ToyConfig, "summary": "a toy", "paper": "none", "group": "offline", "recipe": RECIPE
    }  # fmt: skip
    return Method(train=train, learns_from=learns_from, **(fixed | more))


@pytest.fixture
def go(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., palate.Outcome]:
    """A run of a toy method, on rows of a kind."""

    def make(toy: Method, kind: str, **changes: Any) -> palate.Outcome:
        for part, rows in (("train", ROWS[kind]), ("held_out", ROWS[kind][:2])):
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "rewards.py").write_text(TEXTS)
        options = {
            "model": tiny,
            "data": str(tmp_path / "train.jsonl"),
            "eval_data": str(tmp_path / "held_out.jsonl"),
            "output": tmp_path / "run",
            "batch_size": 2,
            "steps": 2,
            "lora_rank": 2,
            "lr": 1e-2,
            "dtype": "float32",
            "device": "cpu",
        }
        if issubclass(toy.config, RewardConfig):
            options |= {"reward": f"{tmp_path / 'rewards.py'}:length", "max_new_tokens": 5}
        monkeypatch.setattr(launch, "METHODS", {toy.name: toy})
        display = changes.pop("display", None)
        return palate.train(toy.name, toy.configure(options | changes), display=display)

    return make


def rows_of(outcome: palate.Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (outcome.run.directory / "metrics.jsonl").read_text().splitlines()]


def test_of_large_data_only_the_drawn_prompts_are_tokenised() -> None:
    tokenised: list[str] = []

    def prompt_ids(prompt: Prompt) -> tuple[int, ...]:
        tokenised.append(prompt.text)
        return (0,) * len(prompt.text)

    codec = SimpleNamespace(prompt_ids=prompt_ids, max_length=10)
    learner: Any = SimpleNamespace(model=SimpleNamespace(codec=codec))
    cfg = SimpleNamespace(max_new_tokens=6)
    prompts = [Prompt(f"{i // 2}" if i % 3 else "too long") for i in range(300)]
    drawn = drawn_prompts(learner, prompts, cfg, 8, seed=0)
    assert len({prompt.id for prompt in drawn}) == len(drawn) == 8
    assert all(len(prompt.text) <= 4 for prompt in drawn)
    assert len(tokenised) <= 9  # a prompt that is too long, once
    assert drawn == drawn_prompts(learner, prompts, cfg, 8, seed=0)
    assert drawn != drawn_prompts(learner, prompts, cfg, 8, seed=1)
    # With few prompts, all that fit.
    some = drawn_prompts(learner, prompts[:6], cfg, 8, seed=0)
    assert {prompt.text for prompt in some} == {"0", "1", "2"}
    assert drawn_prompts(learner, prompts[:1], cfg, 8, seed=0) == []
    assert drawn_prompts(learner, [], cfg, 8, seed=0) == []


def test_demonstrations(go: Callable[..., palate.Outcome]) -> None:
    outcome = go(method(learn, "demonstrations"), "demonstrations", steps=None, epochs=1)
    summary = outcome.summary
    assert (summary["demonstrations"], summary["steps"], summary["held_out"]) == (6, 3, 2)
    losses = [row["eval_loss"] for row in rows_of(outcome) if "eval_loss" in row]
    assert [summary["loss_before"], summary["loss_after"]] == losses
    assert losses[1] < losses[0]
    assert summary["compared"] == 2


def test_a_variant_may_learn_from_pairs_instead(go: Callable[..., palate.Outcome], tmp_path: Path) -> None:
    toy = method(sampled, "prompts", config=SampledConfig, others=(Way(learn, DirectConfig, "pairs"),))
    outcome = go(toy, "pairs", variant="direct", steps=None, epochs=2)
    assert (outcome.summary["pairs"], outcome.summary["steps"]) == (6, 6)
    assert (outcome.summary["method"], outcome.summary["held_out"]) == ("sampled", 2)
    outcome = go(toy, "prompts", output=tmp_path / "other")
    assert "pairs" not in outcome.summary


def test_held_out_completions_may_have_a_reward_of_their_own(go: Callable[..., palate.Outcome]) -> None:
    outcome = go(method(sampled, "prompts", config=SampledConfig), "prompts", eval_reward="length:3")
    assert outcome.evaluation is not None
    for group in (*outcome.evaluation.before, *outcome.evaluation.after):
        (completion,) = group.completions
        assert group.rewards == (-abs(len(completion.text.split()) - 3) / 3,)


def test_held_out_completions_may_have_a_temperature_of_their_own(
    go: Callable[..., palate.Outcome], tmp_path: Path
) -> None:
    toy = method(sampled, "prompts", config=SampledConfig)

    def before(seed: int, **options: Any) -> list[tuple[int, ...]]:
        evaluation = go(toy, "prompts", seed=seed, output=tmp_path / f"{seed}{options}", **options).evaluation
        assert evaluation is not None
        return [group.completions[0].token_ids for group in evaluation.before]

    assert before(0) != before(1)
    assert before(0, eval_temperature=0) == before(1, eval_temperature=0)


def test_fresh_samples_before_and_after(
    go: Callable[..., palate.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []  # of the sampler, by the policy's version
    draw = rollouts._sampled

    def counted(*arguments: Any) -> Any:
        passes.append(arguments[5])
        return draw(*arguments)

    monkeypatch.setattr(rollouts, "_sampled", counted)
    outcome = go(method(learn, "pairs"), "pairs")
    found = {row["step"]: row["logps/fresh"] for row in rows_of(outcome) if "logps/fresh" in row}
    assert found.keys() == {0, 2}
    evaluation = outcome.evaluation
    assert evaluation is not None
    for step, groups in ((0, evaluation.before), (2, evaluation.after)):
        logps = [logp for group in groups for logp in group.completions[0].logps or ()]
        assert found[step] == pytest.approx(sum(logps) / len(logps))
    assert passes == [0, 2]  # the comparison found those of before in the journal


class Counting(palate.Display):
    """Counts the passes of sampling."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.stages: list[str] = []

    def working(self, stage: str, speed: float) -> None:
        self.stages.append(stage)
        super().working(stage, speed)


@pytest.mark.parametrize(("held_out", "limit"), [(True, 16), (False, 4), (False, 0)])
def test_fresh_samples_without_a_reward(
    go: Callable[..., palate.Outcome], held_out: bool, limit: int
) -> None:
    display = Counting()
    options: dict[str, Any] = {} if held_out else {"eval_data": None}
    outcome = go(method(learn, "pairs"), "pairs", reward=(), fresh_prompts=limit, display=display, **options)
    assert outcome.evaluation is None
    drawn = [row for row in Journal(outcome.run.directory / "journal.db").table() if row["reward"] is None]
    found = {row["step"]: row["logps/fresh"] for row in rows_of(outcome) if "logps/fresh" in row}
    if not limit:
        assert "sample" not in display.stages
        assert (drawn, found) == ([], {})
        return
    assert found.keys() == {0, 2}
    assert found[0] != found[2]
    asked = 2 if held_out else limit
    assert [row["policy_version"] for row in drawn] == [0] * asked + [2] * asked


def test_a_prompt_without_room_is_not_answered(go: Callable[..., palate.Outcome]) -> None:
    # The data leave eight tokens, which is enough to learn from them.
    outcome = go(method(learn, "pairs"), "pairs", reward=(), eval_data=None, max_length=28, max_new_tokens=9)
    assert not [row for row in rows_of(outcome) if "logps/fresh" in row]


def test_no_more_samples_where_every_step_has_its_own(go: Callable[..., palate.Outcome]) -> None:
    recipe = Recipe("model", "current", "each step", ("policy",))
    toy = method(learn, "pairs", recipe=recipe)
    assert not [row for row in rows_of(go(toy, "pairs", reward=())) if "logps/fresh" in row]


def test_a_learner_that_is_no_policy(go: Callable[..., palate.Outcome]) -> None:
    toy = method(
        ranked,
        "pairs",
        config=ScoringConfig,
        learner=scalar,
        summarise=lambda learner, run, held_out: {"held": len(held_out), "steps_of": learner.version},
    )
    outcome = go(toy, "pairs")
    assert outcome.evaluation is None
    assert (outcome.summary["held"], outcome.summary["steps_of"]) == (2, 2)
    assert "accuracy_before" not in outcome.summary
    with pytest.raises(AssertionError, match="no policy"):
        outcome.policy  # noqa: B018
    again = palate.load_model(
        outcome.run.cfg.model_copy(update={"model": str(outcome.run.directory)}), head="scalar"
    )
    assert again.head == "scalar"


@pytest.mark.parametrize("lora", [False, True])
def test_a_run_is_a_model_to_start_from(
    go: Callable[..., palate.Outcome], lora: bool, tmp_path: Path
) -> None:
    toy = method(learn, "demonstrations")
    first = go(toy, "demonstrations", lora=lora, output=tmp_path / "first")
    second = go(toy, "demonstrations", lora=lora, output=tmp_path / "second", model=str(tmp_path / "first"))
    assert second.summary["loss_before"] == pytest.approx(first.summary["loss_after"], abs=1e-5)
    with pytest.raises(ModelError, match="has no finished checkpoint"):
        go(toy, "demonstrations", output=tmp_path / "third", model=str(unfinished(tmp_path / "empty")))


def unfinished(directory: Path) -> Path:
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"method": "dpo", "config": {}, "versions": {}}))
    return directory


def test_a_run_is_a_reward_model(go: Callable[..., palate.Outcome], tmp_path: Path) -> None:
    go(method(ranked, "pairs", config=ScoringConfig, learner=scalar), "pairs", output=tmp_path / "rewards")
    outcome = go(
        method(sampled, "prompts"),
        "prompts",
        reward=f"model:{tmp_path / 'rewards'}",
        output=tmp_path / "policy",
    )
    assert outcome.summary["compared"] == 2


def test_a_mistake_in_the_data_is_told_before_the_model_is_loaded(
    go: Callable[..., palate.Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> Learner:
        raise AssertionError("it has been loaded")

    for kind, other in (("pairs", "demonstrations"), ("demonstrations", "prompts")):
        with pytest.raises(DataError):
            go(method(learn, kind, learner=load), other)


# ---- Pairs beside other data -----------------------------------------------------------------------


class PairsConfig(ToyConfig):
    """Numbers of a toy that reads pairs of its own."""

    pairs: str = ""
    """Where they are."""


def test_pairs_beside_the_prompts(go: Callable[..., palate.Outcome], tmp_path: Path) -> None:
    met: list[tuple[list[Pair], int]] = []

    def both(policy: Policy, annotate: Any, prompts: Sequence[Prompt], cfg: Any, run: Run) -> None:
        met.append(read_pairs(policy, cfg.pairs, cfg, run))
        learn(policy, met[-1][0], cfg, run)

    source = tmp_path / "beside.jsonl"
    rows = [*ROWS["pairs"], {"prompt": "q", "chosen": "a", "rejected": "a"}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    toy = method(both, "prompts", config=PairsConfig)
    go(toy, "prompts", pairs=str(source))
    ((pairs, dropped),) = met
    assert ([pair.chosen.text for pair in pairs], dropped) == ([row["chosen"] for row in ROWS["pairs"]], 1)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    with pytest.raises(RunError, match=r"the data '.*beside\.jsonl' changed since the run"):
        go(toy, "prompts", pairs=str(source))


# ---- What must stay the same -----------------------------------------------------------------------


def again(tiny: str, folder: Path, **changes: Any) -> palate.Outcome:
    """An `oaif` run with a reward of its own, always in the same directory."""
    fixed = {"model": tiny, "device": "cpu", "dtype": "float32", "steps": 1, "batch_size": 2}
    more = {"max_new_tokens": 4, "n": 4, "data": str(folder / "prompts.jsonl"), "output": folder / "run"}
    given = {**fixed, **more, "reward": f"0.5*{folder / 'rewards.py'}:length", **changes}
    return palate.train("oaif", palate.METHODS["oaif"].config.model_validate(given))


def test_another_reward_or_template_under_the_same_name_is_refused(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS["prompts"]))
    (tmp_path / "rewards.py").write_text(TEXTS)
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}: ")
    chat = {"prompt": [{"role": "user", "content": "hi"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(chat) + "\n")
    again(tiny, tmp_path, chat_template=template)
    (tmp_path / "rewards.py").write_text(TEXTS.replace("float", "-float"))
    with pytest.raises(RunError, match=r"the reward in '.*rewards\.py' changed since the run in .* started"):
        again(tiny, tmp_path, chat_template=template)
    (tmp_path / "rewards.py").write_text(TEXTS)
    template.write_text("{{ messages[0]['content'] }}? ")
    with pytest.raises(
        RunError, match=r"the tokenizer or chat template of .* changed since the run in .* started"
    ):
        again(tiny, tmp_path, chat_template=template)


def test_what_auto_stands_for_may_be_given_and_must_not_change(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "q"}) + "\n")
    (tmp_path / "rewards.py").write_text(TEXTS)
    kept = again(tiny, tmp_path, dtype="auto").policy.model.dtype
    name = str(kept).removeprefix("torch.")
    other = torch.bfloat16 if kept == torch.float32 else torch.float32
    real = load.resolve

    def resolved(cfg: Any) -> tuple[torch.device, torch.dtype]:
        device, dtype = real(cfg)
        return device, other if cfg.dtype == "auto" else dtype

    with monkeypatch.context() as patch:  # as on another processor
        patch.setattr(load, "resolve", resolved)
        patch.setattr(directory, "resolve", resolved)
        with pytest.raises(RunError, match=rf"started in {name}; use --dtype {name} to resume it"):
            again(tiny, tmp_path, dtype="auto")
        again(tiny, tmp_path, dtype=name)  # the same, by its name
