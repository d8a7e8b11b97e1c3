from __future__ import annotations

import importlib
import json
import linecache
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from palate.annotate import annotator, scored
from palate.config import ModelConfig, Sampling
from palate.errors import ConfigError, DataError
from palate.loops import RoundsConfig
from palate.model import LoadedModel, load_model
from palate.pool import Pool
from palate.pooling import PoolConfig, make_pool
from palate.settings import load_config
from palate.testing import ScriptedScorer, tiny_model
from palate.types import Completion, Group, Prompt

SAMPLING = Sampling(max_new_tokens=6)
PROMPTS = [Prompt(f"q{i}") for i in range(6)]


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


@pytest.fixture(scope="module")
def model(name: str) -> LoadedModel:
    """The model as a method loads it: with a new adapter."""
    return load_model(ModelConfig(model=name, dtype="float32", device="cpu"))


@pytest.fixture
def made(name: str, tmp_path: Path) -> Callable[..., Pool]:
    def make(prompts: Sequence[Prompt] = PROMPTS, **options: Any) -> Pool:
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": prompt.text}) + "\n" for prompt in prompts))
        fixed = {
            "data": str(file),
            "model": name,
            "dtype": "float32",
            "device": "cpu",
            "shard_size": 4,
            "n": 3,
        }
        fixed |= {"max_new_tokens": 6, "output": tmp_path / "pool", "reward": ["length:2"]}
        return Pool(
            make_pool(load_config(PoolConfig, file=None, flags=fixed | options, python=True)).directory
        )

    return make


def short(completions: Any, **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def method(**options: Any) -> RoundsConfig:
    return RoundsConfig.model_validate({"data": "-", "reward": ["length:2"], **options})


def test_a_fitting_pool_is_accepted(made: Any, model: LoadedModel) -> None:
    pool = made()
    pool.require(model, SAMPLING, 3, method())
    pool.require(model, SAMPLING.model_copy(update={"sampling_rows": 7}), 2, method())


@pytest.mark.parametrize(
    ("sampling", "n", "cfg", "message"),
    [
        (
            SAMPLING,
            4,
            {},
            "has 3 completions of each prompt, but the method needs 4; lower --n, or make a pool",
        ),
        (
            Sampling(max_new_tokens=6, temperature=0.7, top_k=40),
            3,
            {},
            r"was sampled with temperature 1, top_k 0, but here it is temperature 0.7, top_k 40; give the "
            r"same --temperature --top-k",
        ),
        (Sampling(max_new_tokens=6, stop=("x",)), 3, {}, "was sampled with stop none, but here it is stop x"),
        (
            SAMPLING,
            3,
            {"reward": ["sentiment"]},
            "was scored with reward length:2, but here it is reward sentiment",
        ),
        (SAMPLING, 3, {"reward": []}, "was scored by length:2, but no reward is given here"),
        (
            SAMPLING,
            3,
            {"missing_eos_penalty": 1.0},
            "missing_eos_penalty 0, but here it is missing_eos_penalty 1",
        ),
        (
            SAMPLING,
            3,
            {"reward": [], "judge": "local:m"},
            "was scored with reward length:2, judge none, .*but here it is reward none, judge local:m",
        ),
    ],
)
def test_a_difference_is_named_in_one_sentence(
    made: Any, model: LoadedModel, sampling: Sampling, n: int, cfg: dict[str, Any], message: str
) -> None:
    pool = made()
    with pytest.raises(ConfigError, match=message) as caught:
        pool.require(model, sampling, n, method(**cfg))
    assert str(caught.value).startswith(f"the pool in {str(pool.directory)!r} ")
    assert "\n" not in str(caught.value)


def test_other_weights_are_named(made: Any, model: LoadedModel, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", seed=1, initializer_range=0.2)
    loaded = load_model(ModelConfig(model=other, dtype="float32", device="cpu"))
    with pytest.raises(
        ConfigError, match=rf"was sampled from the model {model.source} .* starts from {other}"
    ):
        made().require(loaded, SAMPLING, 3, method())


def test_another_number_format_is_named(made: Any, name: str) -> None:
    loaded = load_model(ModelConfig(model=name, dtype="bfloat16", device="cpu"))
    with pytest.raises(
        ConfigError, match="was sampled in float32, but the policy is in bfloat16; give --dtype float32"
    ):
        made().require(loaded, SAMPLING, 3, method())


def test_the_same_weights_with_and_without_a_new_adapter(made: Any, name: str) -> None:
    whole = load_model(ModelConfig(model=name, dtype="float32", device="cpu", lora=False))
    made().require(whole, SAMPLING, 3, method())


def test_a_trained_model_is_another_model(made: Any, model: LoadedModel, name: str) -> None:
    pool, trained = made(), load_model(ModelConfig(model=name, dtype="float32", device="cpu", lora=False))
    next(trained.network.parameters()).data.add_(1e-3)
    with pytest.raises(ConfigError, match="was sampled from the model"):
        pool.require(trained, SAMPLING, 3, method())


@pytest.fixture
def scorers(tmp_path: Path, name: str) -> Callable[[int], str]:
    """Writes a reward model of a seed, always to the same directory."""

    def make(seed: int) -> str:
        cfg = ModelConfig(model=name, dtype="float32", device="cpu", lora=False)
        load_model(cfg, head="scalar", seed=seed).save(tmp_path / "scorer")
        return f"model:{tmp_path / 'scorer'}"

    return make


def test_a_reward_model_that_was_trained_again_is_named(
    made: Any, model: LoadedModel, scorers: Callable[[int], str]
) -> None:
    pool, cfg = made(reward=[f"0.5*{scorers(0)}"]), method(reward=[f"0.5*{scorers(0)}"])
    pool.require(model, SAMPLING, 3, cfg)
    reward = scorers(1)
    with pytest.raises(ConfigError, match=rf"was scored by another version of {reward}; restore it, or make"):
        pool.require(model, SAMPLING, 3, cfg)


def test_another_code_of_a_module_or_of_a_given_function_is_named(
    made: Any, model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(completions: Any, **_: Any) -> list[float]:
        return [2.0 for _ in completions]

    other.__qualname__ = short.__qualname__
    pool = made(reward=[short])
    pool.require(model, SAMPLING, 3, method(reward=[short]))
    with pytest.raises(ConfigError, match=r"another version of function short given in Python; restore"):
        pool.require(model, SAMPLING, 3, method(reward=[other]))
    monkeypatch.syspath_prepend(tmp_path)
    for value, refused in ((1, False), (2, True)):
        code = f"def f(completions, **_):\n    return [{value}.0 for _ in completions]\n"
        (tmp_path / "pool_rewards.py").write_text(code)
        sys.modules.pop("pool_rewards", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        cfg = method(reward=["pool_rewards:f"])
        if not refused:
            pool = made(reward=["pool_rewards:f"], output=tmp_path / "second")
            pool.require(model, SAMPLING, 3, cfg)
            continue
        with pytest.raises(ConfigError, match=r"another version of pool_rewards:f; restore"):
            pool.require(model, SAMPLING, 3, cfg)


def test_a_prompt_that_is_not_there_is_named(made: Any, model: LoadedModel) -> None:
    new = Prompt("new", where="more.jsonl:7")
    with pytest.raises(
        ConfigError, match=r"lacks 1 of 7 prompts, the first is 'new' more.jsonl:7; make it from"
    ):
        made().groups([*PROMPTS, new], 3, model.codec)


def test_a_prompt_with_other_columns_is_not_there(made: Any, model: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="lacks 1 of 1 prompts"):
        made().groups([Prompt("q0", {"answer": 1})], 3, model.codec)


def test_another_rendering_is_named(made: Any, name: str, tmp_path: Path) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    cfg = ModelConfig(model=name, dtype="float32", device="cpu", chat_template=template)
    with pytest.raises(DataError, match="other tokens of the prompt 'q0'; give the same --chat-template"):
        made().groups(PROMPTS, 3, load_model(cfg).codec)


def test_a_place_without_a_pool_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'.*none' is not a directory, so it holds no pool; make one with `palate pool"
    ):
        Pool(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"has no pool.json"):
        Pool(tmp_path)


def test_an_unfinished_pool_is_refused(made: Any) -> None:
    pool = made()
    (pool.directory / "shards" / "00001.parquet").unlink()
    with pytest.raises(
        ConfigError, match="is not finished: 1 of 2 files are written; run the `palate pool` command"
    ):
        Pool(pool.directory)


def test_another_format_is_refused(made: Any) -> None:
    file = made().directory / "pool.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(ConfigError, match="has format 99, expected 1"):
        Pool(file.parent)


def test_prompts_without_completions_are_left_out_and_named(made: Any, model: LoadedModel) -> None:
    said: list[str] = []
    prompts = [*PROMPTS, Prompt("longer")]  # the context has room for three more tokens than a completion
    pool = made(prompts, max_new_tokens=240, max_length=243)
    assert len(pool.groups(prompts, 3, model.codec, said.append)) == 6
    assert len(said) == 1
    assert "no completions of 1 of 7 prompts, which are left out; the first reason: " in said[0]
    with pytest.raises(DataError, match="has no completions of these prompts; the first reason: "):
        pool.groups(prompts[-1:], 3, model.codec)


# ---- Rewards ----------------------------------------------------------------------------------------


def asked(_: Any) -> Any:
    raise AssertionError("the pool has the rewards")


def test_rewards_come_from_the_pool(made: Any, model: LoadedModel) -> None:
    pool = made()
    groups = pool.groups(PROMPTS, 3, model.codec)
    known = pool.annotator(asked)(groups)
    assert [g.rewards for g in known] == [g.rewards for g in annotator(["length:2"])(groups)]


def test_parts_of_a_sum_come_from_the_pool(made: Any, model: LoadedModel) -> None:
    pool = made(reward=["length:2", "0.5*length:5"])
    groups = pool.groups(PROMPTS, 2, model.codec)
    known, own = pool.annotator(asked)(groups), annotator(["length:2", "0.5*length:5"])(groups)
    assert [(g.rewards, g.parts) for g in known] == [(g.rewards, g.parts) for g in own]


def test_completions_of_others_are_asked_about(made: Any, model: LoadedModel) -> None:
    pool = made()
    first, *others = pool.groups(PROMPTS, 3, model.codec)
    mixed = Group(first.prompt, (*first.completions, Completion("of data", (1, 2))))
    known = pool.annotator(scored(ScriptedScorer(lambda text: 7.0)))([mixed, *others])
    assert known[0].rewards == (7.0,) * 4  # by one annotator, so that they can be compared
    assert known[1].rewards == annotator(["length:2"])(others)[0].rewards


def test_noisy_rewards_are_drawn_again(made: Any, model: LoadedModel) -> None:
    pool = made(label_noise=0.2)
    annotate = annotator(["length:2"])
    assert pool.facts.scope == "group"
    assert pool.annotator(annotate) is annotate
