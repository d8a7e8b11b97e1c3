"""What holds of every method, by being in METHODS."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import palate
from palate import method as declared
from palate import methods
from palate.cli.descriptions import description
from palate.config import MethodConfig, Sampling
from palate.errors import AnnotatorError, ConfigError, DataError, RunError
from palate.methods import METHODS
from palate.testing import END

NAMES = pytest.mark.parametrize("name", sorted(METHODS))
POLICIES = pytest.mark.parametrize(
    "name", [name for name in sorted(METHODS) if issubclass(METHODS[name].config, Sampling)]
)
"""Methods that train what can be sampled from; of the others, their own tests say what comes of them."""
LORA = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])

# TRL's names: what a reader of any method's curves looks for, whatever the method.
CORE = {
    "loss",
    "grad_norm",
    "learning_rate",
    "logps/training",
    "num_tokens",
    "entropy",
    "step_time",
}
PAIRED = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}
UNPAIRED = {name for name, method in METHODS.items() if method.batches_of not in ("prompt", "pair")} | {
    "rlhf",
    "rlaif",
}
"""Methods whose loss is not on pairs."""
UNREFERRED = {name for name, method in METHODS.items() if "reference" not in method.recipe.networks}
"""Methods without a reference."""
OWN: dict[str, dict[str, Any]] = {
    "rso": {"n": 6, "accept": 4},
    "click": {"n": 6, "threshold": 50.0},
    "rest": {"thresholds": [0.0]},
    "rlhf": {"ppo_epochs": 1},  # so that steps and optimizer steps are as many
    "rlaif": {"ppo_epochs": 1, "reward_steps": 1},
}
"""Options for methods whose defaults do not suit the few rows and the reward here; most need none."""
BEFORE = {"rlaif": 1}
"""Steps of a run before those of its policy, by method; most have none."""
ROWS: dict[str, list[dict[str, Any]]] = {
    "prompts": [{"prompt": f"question {i}", "wanted": "e"} for i in range(6)],
    "pairs": [
        {"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"oh no {i * i}"} for i in range(8)
    ],
    "demonstrations": [{"prompt": f"question {i}", "completion": f"yes {i}"} for i in range(8)],
}
REWARD = """
def letters(completions, completion_ids):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(map(ord, t)) % 101 + len(ids) / 7 for t, ids in zip(texts, completion_ids)]
"""


@pytest.fixture
def options(tiny: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A tiny run's options by the name of its method. A method in rounds has one, unless it is told."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        way = METHODS[name].variant(changes.get("variant"))
        kind = way.learns_from
        for part in ("train", "held_out"):
            rows = ROWS[kind] if part == "train" else ROWS[kind][:3]
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "rewards.py").write_text(REWARD)
        fixed = {
            "model": tiny,
            "data": str(tmp_path / "train.jsonl"),
            "eval_data": str(tmp_path / "held_out.jsonl"),
            "output": tmp_path / "run",
            "reward": f"{tmp_path / 'rewards.py'}:letters",
            "steps": 3,
            "batch_size": 4,
            "max_new_tokens": 6,
            "lora_rank": 2,
            "dtype": "float32",
            "device": "cpu",
            "lr": 1e-2,
        }
        known = {**fixed, "rounds": 1, **OWN.get(name, {})}
        return {key: value for key, value in known.items() if key in way.config.model_fields} | changes

    return make


def train(name: str, options: dict[str, Any], **more: Any) -> palate.Outcome:
    return palate.train(name, METHODS[name].configure(options), **more)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# ---- What a method declares ------------------------------------------------------------------------


def test_a_file_with_a_method_is_a_method() -> None:
    files = Path(str(methods.__file__)).parent.glob("*.py")
    declared = {
        f.stem.replace("_", "-") for f in files if re.search(r"^METHOD\b", f.read_text(), re.MULTILINE)
    }
    assert set(METHODS) == declared
    assert {"dpo", "ipo", "oaif"} <= declared


@NAMES
def test_names(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.train.__module__ == f"palate.methods.{name.replace('-', '_')}"
    assert method.config.__module__ == method.train.__module__


@NAMES
def test_it_says_what_it_is_and_whose(name: str) -> None:
    method = METHODS[name]
    assert re.search(r"\barXiv:\d{4}\.\d{5}\b", method.paper)
    source = Path(str(sys.modules[method.train.__module__].__file__)).read_text()
    opening = source.split('"""')[1]
    assert method.paper.split("arXiv:")[1][:10] in opening  # the module cites the same paper
    assert 10 < len(method.summary) < 100
    assert "\n" not in method.summary
    assert method.group in declared.METHOD_GROUPS


@NAMES
def test_every_option_is_explained(name: str) -> None:
    cls = METHODS[name].config
    assert issubclass(cls, MethodConfig)
    for field in cls.model_fields:
        assert description(cls, field), f"{cls.__name__}.{field}"


@NAMES
def test_a_learning_rate_is_vetted_for_adapters_and_for_all_weights(name: str) -> None:
    cls = METHODS[name].config
    assert {cls(data="x", lora=True).lr, cls(data="x", lora=False).lr} == set(cls.vetted_lr.values())
    assert cls(data="x", lr=0.5).lr == 0.5


@NAMES
def test_its_paper_config_fits(name: str) -> None:
    file = Path(__file__).parents[2] / "configs" / "paper" / f"{name}.yaml"
    from palate.settings import load_config

    lessons = {"eft": "x"} if name == "self-rewarding" else {}
    load_config(METHODS[name].config, file=file, flags={"data": "x", **lessons})


# ---- A whole run -----------------------------------------------------------------------------------


@POLICIES
def test_a_bound_on_the_kl_ends_training_within_it(
    name: str, options: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # of so few samples the estimate may be anything
        patch.setattr("palate.launch.measure.kl_from", lambda *_, **__: 1.0)
        outcome = train(name, options(name, max_kl=0.5, kl_every=2, eval_data=None))
    assert [row["kl/fresh"] for row in rows_of(outcome.run.directory) if "kl/fresh" in row] == [1.0]
    assert outcome.summary["steps"] == outcome.learner.version == 0  # back to the start
    untrained = palate.Policy.load(
        METHODS[name].configure(options(name)), total_steps=1
    ).model.network.state_dict()
    for weight, tensor in outcome.policy.model.network.state_dict().items():
        assert torch.equal(tensor, untrained[weight]) or "lora_A" in weight  # drawn by the run's own seed

    free = train(name, options(name, kl_every=2, kl_prompts=3, eval_data=None, output=tmp_path / "free"))
    assert free.learner.version > 0
    assert any("kl/fresh" in row for row in rows_of(free.run.directory))


@POLICIES
@LORA
def test_a_run_leaves_everything(name: str, lora: bool, options: Callable[..., dict[str, Any]]) -> None:
    outcome = train(name, options(name, lora=lora))
    directory = outcome.run.directory

    config = json.loads((directory / "config.json").read_text())
    assert config["method"] == name
    assert config["config"] == METHODS[name].config.model_validate(options(name, lora=lora)).model_dump(
        mode="json"
    )

    steps = [row for row in rows_of(directory) if "loss" in row]
    before = BEFORE.get(name, 0)
    assert [row["step"] - before for row in steps] == [1, 2, 3]
    for row in steps:
        assert row.keys() >= CORE
        assert all(isinstance(value, int | float) for value in row.values())
        if name not in UNPAIRED:
            assert row.keys() >= PAIRED
            assert 0 <= row["rewards/accuracies"] <= 1
            margin = row["rewards/chosen"] - row["rewards/rejected"]
            assert row["rewards/margins"] == pytest.approx(margin, abs=1e-5)
            assert row["logps/chosen"] < 0
        assert row["logps/training"] < 0
        assert row["grad_norm"] > 0
        assert row["learning_rate"] == 1e-2
        assert 0 < row["entropy"] < 5.6  # log of the vocabulary's 259
        assert row["step_time"] >= row["time/learn"] > 0
    tokens = [row["num_tokens"] for row in steps]
    assert tokens == sorted(set(tokens))  # counted up over the run
    fresh = [row["step"] for row in rows_of(directory) if "logps/fresh" in row]
    assert {fresh[0] - before, fresh[-1] - before} in ({0, 3}, {1, 3})  # before and after, or in every step

    summary = json.loads((directory / "summary.json").read_text())
    last = before + 3
    assert (summary["method"], summary["steps"]) == (name, last)
    assert summary["checkpoint"] == f"checkpoints/step-{last}"
    assert 0 <= summary["win_rate_low"] <= summary["win_rate"] <= summary["win_rate_high"] <= 1
    assert summary["compared"] == 3
    assert summary["kl"] != 0
    assert summary == outcome.summary
    assert outcome.evaluation is not None
    measured = [c for g in (*outcome.evaluation.before, *outcome.evaluation.after) for c in g.completions]
    assert len(measured) == 6
    assert all(len(c.token_ids) <= 6 for c in measured)  # sampled as the run says


@POLICIES
@LORA
def test_its_checkpoint_loads_without_palate(
    name: str, lora: bool, options: Callable[..., dict[str, Any]], tiny: str
) -> None:
    outcome = train(name, options(name, lora=lora))
    path = str(outcome.run.directory / outcome.summary["checkpoint"])
    loaded: Any = AutoModelForCausalLM.from_pretrained(tiny if lora else path, dtype=torch.float32)
    start: Any = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    if lora:
        loaded = PeftModel.from_pretrained(loaded, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<bos>user:Hi<end><bos>assistant:"  # the template came along
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        there, here, untrained = (
            m(input_ids=ids).logits
            for m in (loaded.eval(), outcome.policy.model.network.eval(), start.eval())
        )
    torch.testing.assert_close(there, here, atol=1e-5, rtol=1e-5)
    assert (there - untrained).abs().max() > 1e-3  # it is the trained one
    assert tokenizer.eos_token == END


@POLICIES
@LORA
def test_its_checkpoint_is_a_model_to_start_from(
    name: str, lora: bool, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    first = train(name, options(name, lora=lora, output=tmp_path / "first"))
    checkpoint = first.run.directory / first.summary["checkpoint"]
    second = train(name, options(name, lora=lora, model=str(checkpoint), output=tmp_path / "second"))
    start = rows_of(second.run.directory)
    (step, *_) = [row for row in start if "loss" in row]
    if "loss_before" in second.summary:
        assert second.summary["loss_before"] == pytest.approx(first.summary["loss_after"], abs=1e-5)
    if name in UNREFERRED:
        assert second.evaluation is not None
        said = second.evaluation.before  # by what it starts from, which is what the first has left
        logps = [torch.tensor(c.logps) for group in said for c in group.completions]
        for here, there in zip(first.policy.logps(said).rows(), logps, strict=True):
            torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    else:
        apart = "rewards/margins" if name not in UNPAIRED else "objective/kl"
        assert step[apart] == 0.0  # the reference is the checkpoint, not what it was made from
    assert (second.policy.model.peft is not None) == lora


@NAMES
def test_without_held_out_data_nothing_is_compared(name: str, options: Callable[..., dict[str, Any]]) -> None:
    outcome = train(name, options(name, eval_data=None, steps=1))
    assert outcome.evaluation is None
    assert "win_rate" not in outcome.summary
    assert (outcome.run.directory / outcome.summary["checkpoint"]).is_dir()


@NAMES
def test_the_same_run_twice(name: str, options: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    one, two = (
        train(name, options(name, lora=False, output=tmp_path / str(i))).learner.model.network.state_dict()
        for i in range(2)
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


@NAMES
def test_the_schedule_ends_with_the_run(name: str, options: Callable[..., dict[str, Any]]) -> None:
    outcome = train(name, options(name, schedule="linear", warmup_steps=1, steps=4, eval_data=None))
    rates = [row["learning_rate"] for row in rows_of(outcome.run.directory) if "loss" in row]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])


# ---- What a user gets wrong ------------------------------------------------------------------------


@POLICIES
def test_a_reward_that_does_not_exist_is_told_before_training(
    name: str, options: Callable[..., dict[str, Any]]
) -> None:
    # Also where it only serves the measurement afterwards: it must not cost the training.
    given = options(name, reward="no_such_module:f")
    with pytest.raises(AnnotatorError, match="no_such_module"):
        train(name, given)
    assert not Path(given["output"]).exists()


@POLICIES
def test_a_prompt_without_room_is_told_before_training(
    name: str, options: Callable[..., dict[str, Any]]
) -> None:
    given = options(name, max_new_tokens=250)
    with pytest.raises(DataError, match=r"held_out\.jsonl:1|train\.jsonl:1"):
        train(name, given)
    assert not Path(given["output"]).exists()


@POLICIES
def test_a_reward_that_fails_afterwards_does_not_cost_the_training(
    name: str, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = options(name, steps=1)
    held_out = {**ROWS[METHODS[name].learns_from][0], "prompt": "the last straw"}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(held_out))
    (tmp_path / "rewards.py").write_text(
        REWARD + "def fussy(prompts, completions, completion_ids):\n"
        "    assert 'last straw' not in str(prompts)\n"
        "    return letters(completions, completion_ids)\n"
    )
    with pytest.raises(AnnotatorError, match="fussy raised AssertionError"):
        train(name, {**given, "reward": f"{tmp_path / 'rewards.py'}:fussy"})
    last = BEFORE.get(name, 0) + 1
    assert (given["output"] / "checkpoints" / f"step-{last}" / "tokenizer.json").is_file()


@NAMES
def test_a_run_is_not_overwritten_by_another(name: str, options: Callable[..., dict[str, Any]]) -> None:
    given = options(name, steps=1, eval_data=None)
    train(name, given)
    with pytest.raises(RunError, match=r"already holds a run: lr is 0.01 there and 0.02 here.*--overwrite"):
        train(name, {**given, "lr": 0.02})
    again = train(name, {**given, "lr": 0.02, "overwrite": True})
    assert again.summary["steps"] == BEFORE.get(name, 0) + 1


# ---- Cut off and gone on with ----------------------------------------------------------------------


class Unplugged(palate.Display):
    """Pulls the plug at a moment of a run: before, in the middle of, or after a step's work."""

    def __init__(self, moment: str, count: int) -> None:
        super().__init__(quiet=True)
        self.moment, self.count = moment, count

    def _at(self, moment: str) -> None:
        self.count -= moment == self.moment
        if self.count == 0:
            raise KeyboardInterrupt

    def step(self, step: int) -> None:
        self._at("step")
        super().step(step)

    def working(self, stage: str, speed: float) -> None:
        self._at(stage)
        super().working(stage, speed)

    def metrics(self, row: Any, samples: Any) -> None:
        self._at("metrics")
        super().metrics(row, samples)


TIMES = re.compile(r"time/|step_time|tokens_per_second")


def numbers(directory: Path) -> list[dict[str, Any]]:
    """The rows of metrics without what a clock says."""
    return [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows_of(directory)]


@NAMES
@pytest.mark.parametrize(
    ("moment", "lora"), [("step", True), ("learn", False), ("learn", True), ("metrics", False)]
)
def test_a_run_that_was_cut_off_ends_in_the_same_weights(
    name: str, lora: bool, moment: str, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = options(name, lora=lora, checkpoint_every=1, steps=4, schedule="linear")
    whole = train(name, {**given, "output": tmp_path / "whole"})
    cut = {**given, "output": tmp_path / "cut"}
    for count in (1, 2):  # twice: it is resumed, and cut off again
        with pytest.raises(KeyboardInterrupt):
            train(name, cut, display=Unplugged(moment, count))
    resumed = train(name, cut)
    one, other = (o.learner.model.network.state_dict() for o in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert numbers(whole.run.directory) == numbers(resumed.run.directory)
    clock = {"seconds"}
    assert {k: v for k, v in whole.summary.items() if k not in clock} == {
        k: v for k, v in resumed.summary.items() if k not in clock
    }


ROUNDS = [name for name in sorted(METHODS) if "rounds" in METHODS[name].config.model_fields]


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize(("count", "lora"), [(1, True), (3, False), (5, True)])
def test_rounds_that_were_cut_off_end_in_the_same_weights(
    name: str, lora: bool, count: int, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = options(name, lora=lora, checkpoint_every=1, rounds=3, steps=2, schedule="linear")
    whole = train(name, {**given, "output": tmp_path / "whole"})
    assert whole.summary["steps"] == 6
    cut = {**given, "output": tmp_path / "cut"}
    with pytest.raises(KeyboardInterrupt):
        train(name, cut, display=Unplugged("metrics", count))
    resumed = train(name, cut)
    one, other = (o.policy.model.network.state_dict() for o in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert numbers(whole.run.directory) == numbers(resumed.run.directory)


@NAMES
def test_a_finished_run_does_nothing_again(name: str, options: Callable[..., dict[str, Any]]) -> None:
    given = options(name)
    first = train(name, given)
    again = train(name, given, display=Unplugged("sample", 1))  # a token sampled would end it
    assert again.summary == first.summary
    assert again.evaluation == first.evaluation
    assert rows_of(first.run.directory) == rows_of(again.run.directory)


@NAMES
def test_more_steps_go_on_from_the_end(name: str, options: Callable[..., dict[str, Any]]) -> None:
    given = options(name, steps=2)
    train(name, given)
    further = METHODS[name].config.may_change_bits >= {"steps"}  # else the steps of a round are fixed
    more = train(name, {**given, "steps": 4} if further else {**given, "rounds": 2})
    before = BEFORE.get(name, 0)
    assert [row["step"] - before for row in rows_of(more.run.directory) if "loss" in row] == [1, 2, 3, 4]
    assert more.summary["steps"] == before + 4
    assert more.summary["checkpoint"] == f"checkpoints/step-{before + 4}"


@NAMES
def test_other_data_are_refused(name: str, options: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    given = options(name, steps=1, eval_data=None)
    train(name, given)
    other = [{**row, "prompt": row["prompt"] + "?"} for row in ROWS[METHODS[name].learns_from]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    with pytest.raises(RunError, match=r"the data changed since the run .* started"):
        train(name, given)


@NAMES
def test_another_reference_is_refused(
    name: str, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    shutil.copytree(options(name)["model"], tmp_path / "base")
    given = options(name, steps=1, eval_data=None, model=str(tmp_path / "base"))
    train(name, given)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors[next(iter(tensors))].view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"the model .* changed since the run .* started"):
        train(name, given)


def test_an_unknown_method() -> None:
    with pytest.raises(ConfigError, match=r"unknown method 'dpoo'; did you mean 'dpo'\?"):
        palate.train("dpoo", METHODS["dpo"].config(data="x"))


def test_another_methods_config() -> None:
    with pytest.raises(ConfigError, match="oaif expects a OAIFConfig, but got a DPOConfig"):
        palate.train("oaif", METHODS["dpo"].config(data="x"))


# ---- Pairs that are none ---------------------------------------------------------------------------

PAIRS = pytest.mark.parametrize("name", [n for n in sorted(METHODS) if METHODS[n].learns_from == "pairs"])


@PAIRS
def test_equal_pairs_are_left_out_and_counted(
    name: str, options: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(name, max_length=40, eval_data=None, epochs=1, steps=None, schedule="linear")
    rows = [
        *ROWS["pairs"],
        {"prompt": "same", "chosen": "a", "rejected": "a"},
        {"prompt": "cut to the same", "chosen": "a" * 40 + "b", "rejected": "a" * 40 + "c"},
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = train(name, given, display=palate.Display())
    assert (outcome.summary["pairs"], outcome.summary["pairs_dropped"]) == (8, 2)
    # 8 pairs in batches of 4, not 9 or 10: also for the schedule, which must come down to its end.
    assert outcome.summary["steps"] == 2
    rates = [row["learning_rate"] for row in rows_of(outcome.run.directory) if "learning_rate" in row]
    assert rates == [1e-2, 0.5e-2]
    lines = capsys.readouterr().err
    assert "left out 1 row, first" in lines
    assert "train.jsonl:9: chosen and rejected are the same" in lines
    assert "left out 1 row: chosen and rejected are the same, cut to the model's context" in lines


@pytest.mark.parametrize("name", [name for name in POLICIES.args[1] if METHODS[name].learns_from == "pairs"])
def test_held_out_accuracy_before_and_after(name: str, options: Callable[..., dict[str, Any]]) -> None:
    summary = train(name, options(name, reward=(), steps=2)).summary
    assert summary["held_out_pairs"] == 3
    assert summary["accuracy_before"] == 0.5
    assert 0 <= summary["accuracy_low"] <= summary["accuracy_after"] <= summary["accuracy_high"] <= 1


# ---- On pairs from data, for methods that sample otherwise -------------------------------------------

DIRECT = pytest.mark.parametrize(
    "name",
    [n for n, m in sorted(METHODS.items()) if any(way.learns_from == "pairs" for way in m.others)],
)


@DIRECT
def test_the_direct_way_samples_nothing(name: str, options: Callable[..., dict[str, Any]]) -> None:
    given = options(name, variant="direct", reward=(), steps=None, epochs=1, fresh_prompts=0)
    outcome = train(name, given, display=Unplugged("sample", 1))  # a token sampled would end it
    assert (outcome.summary["pairs"], outcome.summary["steps"]) == (8, 2)  # 8 pairs in batches of 4
    assert outcome.evaluation is None
    for row in rows_of(outcome.run.directory):
        assert row.keys() >= (CORE if "loss" in row else {"eval_loss", "eval_logps/training"})


@DIRECT
def test_the_direct_way_is_measured_by_a_reward(name: str, options: Callable[..., dict[str, Any]]) -> None:
    summary = train(name, options(name, variant="direct")).summary
    assert summary["compared"] == 3


@DIRECT
@LORA
def test_the_direct_way_goes_on_where_it_was_cut_off(
    name: str, lora: bool, options: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    given = options(name, variant="direct", lora=lora, checkpoint_every=1)
    whole = train(name, {**given, "output": tmp_path / "whole"})
    with pytest.raises(KeyboardInterrupt):
        train(name, given, display=Unplugged("metrics", 2))
    resumed = train(name, given)
    one, other = (o.policy.model.network.state_dict() for o in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert numbers(whole.run.directory) == numbers(resumed.run.directory)
