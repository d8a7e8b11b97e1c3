from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import palate.cli.speakers as module
from palate.cli.speakers import Speaker, speakers
from palate.config import ModelConfig, Sampling
from palate.errors import DataError, ModelError, RunError
from palate.model import Snapshot, load_model
from palate.model.sampling import choose
from palate.testing import tiny_model
from palate.types import Completion, Group, Prompt

MakeRun = Callable[..., Path]

FEW = Sampling(max_new_tokens=6)
LONG = Sampling(max_new_tokens=100)


def said(model: str | Path, sampling: Sampling = FEW, seed: int = 0) -> str:
    """What the model in a directory answers to "hi", loaded by itself."""
    loaded = load_model(ModelConfig(model=str(model), dtype="float32", device="cpu"), trainable=False)
    snapshot = Snapshot(0, lambda: nullcontext(loaded), micro_batch_tokens=2048)
    prompt = Prompt(({"role": "user", "content": "hi"},))
    return snapshot.sample([prompt], 1, sampling, seed=seed)[0].completions[0].text


def answers(found: list[Speaker], sampling: Sampling = FEW, seed: int = 0) -> dict[str, str]:
    return {speaker.name: speaker.answer("hi", "", sampling, seed)[0].text for speaker in found}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded, as they are."""
    found: list[str] = []

    def load(cfg: ModelConfig, **options: Any) -> Any:
        found.append(cfg.model)
        return load_model(cfg, **options)

    monkeypatch.setattr(module, "load_model", load)
    return found


# ---- Which models ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "loaded"), [(True, 1), (False, 2)])
def test_both_answer_as_they_do_alone(
    make_run: MakeRun, tiny: str, loads: list[str], lora: bool, loaded: int
) -> None:
    run = make_run(lora=lora)
    found = speakers(run)
    assert len(loads) == loaded  # an adapter and its base are one set of weights
    told = answers(found)
    assert list(told) == ["base", "checkpoint"]
    assert told == {"base": said(tiny), "checkpoint": said(run / "checkpoints/step-3")}
    assert told["base"] != told["checkpoint"]


def test_a_run_that_continued_an_adapter_started_from_that(make_run: MakeRun, tmp_path: Path) -> None:
    first = make_run("first") / "checkpoints/step-3"
    run = make_run("second", model=str(first), steps=(5,))
    told = answers(speakers(run))
    assert told == {"base": said(first), "checkpoint": said(run / "checkpoints/step-5")}


def test_the_last_checkpoint_or_the_one_asked_for(make_run: MakeRun) -> None:
    run = make_run(steps=(9, 10))  # as text, 9 would be the last
    (run / "checkpoints/.step-11.77").mkdir()  # being written
    assert answers(speakers(run, only="checkpoint")) == {"checkpoint": said(run / "checkpoints/step-10")}
    assert answers(speakers(run, only="checkpoint", step=9)) == {
        "checkpoint": said(run / "checkpoints/step-9")
    }


def test_the_base_needs_no_checkpoint(describe: MakeRun, tmp_path: Path, tiny: str, loads: list[str]) -> None:
    run = describe(tmp_path / "run", model=tiny, dtype="float32")
    assert answers(speakers(run, only="base")) == {"base": said(tiny)}
    assert loads == [tiny]


def test_leave_to_run_code_is_asked_for_again(
    make_run: MakeRun, describe: MakeRun, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(lora=False)
    describe(run, model=tiny, trust_remote_code=True)
    given: list[bool] = []

    def load(cfg: ModelConfig, **options: Any) -> Any:
        given.append(cfg.trust_remote_code)
        return load_model(cfg, **options)

    monkeypatch.setattr(module, "load_model", load)
    speakers(run, device="cpu")
    speakers(run, device="cpu", trust_remote_code=True)
    assert given == [False, False, True, True]


def test_a_template_that_the_run_was_given(
    make_run: MakeRun, describe: MakeRun, tmp_path: Path, tiny: str
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<bos>{{ m['content'] }}!{% endfor %}")
    run = make_run(lora=False)
    describe(run, model=tiny, chat_template=str(template))
    base, trained = speakers(run)
    assert base.codec.text(base.codec.prompt_ids(Prompt("hi"))) == "hi!"
    assert trained.codec.text(trained.codec.prompt_ids(Prompt("hi"))).startswith(
        "user:hi"
    )  # it brings its own


# ---- Mistakes --------------------------------------------------------------------------------------


def test_a_reward_models_checkpoint(make_run: MakeRun, tiny: str) -> None:
    for lora, file, change in (
        (True, "adapter_config.json", {"task_type": "SEQ_CLS"}),
        (False, "config.json", {"architectures": ["LlamaForSequenceClassification"]}),
    ):
        run = make_run(f"lora {lora}", lora=lora)
        path = run / "checkpoints/step-3" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(RunError, match="is a reward model and cannot generate text"):
            speakers(run)


def test_a_base_model_that_is_gone(tmp_path: Path, tiny: str, make_run: MakeRun) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    run = make_run(model=str(model), lora=False)
    shutil.rmtree(model)
    with pytest.raises(
        ModelError, match=r"the base model of the run '.*run' cannot be loaded: model '.*model' does"
    ):
        speakers(run)


def test_a_broken_checkpoint(make_run: MakeRun) -> None:
    run = make_run()
    weights = run / "checkpoints/step-3/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match="could not be loaded"):
        speakers(run)


def test_a_configuration_that_is_none(describe: MakeRun, tmp_path: Path) -> None:
    run = describe(tmp_path / "run", model="m", dtype="float8")
    with pytest.raises(
        RunError, match=r"config.json' cannot be used: dtype is 'float8', expected one of auto"
    ):
        speakers(run)


# ---- What a speaker hears and remembers ------------------------------------------------------------


class Scripted(Snapshot):
    """Answers with given texts, or by raising, and keeps what it was asked."""

    def __init__(self, *script: str | BaseException) -> None:
        self.script = list(script)
        self.contents: list[Any] = []
        self.samplings: list[Sampling] = []
        self.seeds: list[int] = []

    def sample(self, prompts: Any, n: int, sampling: Sampling, *, seed: int) -> list[Group]:
        self.contents.append(prompts[0].content)
        self.samplings.append(sampling)
        self.seeds.append(seed)
        said = self.script.pop(0)
        if isinstance(said, BaseException):
            raise said
        return [Group(prompts[0], (Completion(said, (1, 2), finish="eos"),))]


def scripted(model: str, *script: str | BaseException, name: Any = "base") -> tuple[Speaker, Scripted]:
    codec = load_model(ModelConfig(model=model, device="cpu"), trainable=False).codec
    snapshot = Scripted(*script)
    return Speaker(name, "somewhere", snapshot, codec), snapshot


def test_turns_are_remembered(tiny: str) -> None:
    speaker, snapshot = scripted(tiny, " one", "two")
    speaker.answer("a", "S", FEW, 7)
    speaker.answer("b", "S", FEW, 7)
    assert [(turn["role"], turn["content"]) for turn in snapshot.contents[1]] == [
        ("system", "S"), ("user", "a"), ("assistant", " one"), ("user", "b"),
    ]  # fmt: skip
    assert snapshot.seeds == [7, 7]
    assert snapshot.samplings == [FEW, FEW]


def test_without_a_template_the_text_goes_on(tiny_plain: str) -> None:
    speaker, snapshot = scripted(tiny_plain, " upon a time", " day")
    speaker.answer("Once", "", FEW, 0)
    speaker.answer("One", "", FEW, 0)
    speaker.turns.clear()
    snapshot.script.append("")
    speaker.answer("x", "Say.", FEW, 0)
    assert snapshot.contents == ["Once", "Once upon a time\nOne", "Say.\nx"]


def test_the_oldest_turns_are_forgotten(tiny: str) -> None:
    # 256 tokens, one a byte: "<bos>user:" (6), the text and "<end>" (1); for the assistant 11 + text + 1; and
    # the opening of the answer, 11. Turns of 30 + 30 bytes take 79. With 100 tokens kept free, 156 are left:
    # for the first turn of 48 and one former one (127), not two (206).
    speaker, snapshot = scripted(tiny, *(letter * 30 for letter in "abcd"))
    forgotten = [speaker.answer(letter * 30, "", LONG, 0)[1] for letter in "ABCD"]
    assert forgotten == [0, 0, 1, 1]
    assert [turn["content"][0] for turn in snapshot.contents[3]] == ["C", "c", "D"]
    assert [turn[0][0] for turn in speaker.turns] == ["C", "D"]
    assert {sampling.max_new_tokens for sampling in snapshot.samplings} == {100}


def test_an_answer_takes_the_room_that_there_is(tiny: str) -> None:
    speaker, snapshot = scripted(tiny, "", "")
    speaker.answer("x" * 200, "", Sampling(max_new_tokens=500, min_new_tokens=400), 0)
    assert snapshot.samplings[0].max_new_tokens == 256 - (6 + 200 + 1 + 11)
    assert snapshot.samplings[0].min_new_tokens == snapshot.samplings[0].max_new_tokens


def test_a_turn_that_fills_the_context_was_not_said(tiny: str) -> None:
    speaker, _ = scripted(tiny, "fine", "too")
    speaker.answer("hi", "", FEW, 0)
    with pytest.raises(DataError, match="this turn: the prompt has 318 tokens"):
        speaker.answer("x" * 300, "", FEW, 0)
    assert speaker.turns == [("hi", "fine")]  # nor is anything forgotten for it


def test_a_template_that_refuses_a_system_turn(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, chat=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    speaker, _ = scripted(model, "yes")
    with pytest.raises(DataError, match=r"the chat template of .* refuses it: no system turns"):
        speaker.answer("hi", "be kind", FEW, 0)
    assert speaker.answer("hi", "", FEW, 0)[0].text == "yes"


def test_an_interrupted_answer_leaves_the_model_as_it_was(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = speakers(make_run())
    expected = answers(found)
    for speaker in found:
        speaker.turns.clear()
        draws = iter(range(3))

        def interrupt(*given: Any, draws: Any = draws, **options: Any) -> Any:
            if next(draws) == 2:
                raise KeyboardInterrupt
            return choose(*given, **options)

        with monkeypatch.context() as patch:
            patch.setattr("palate.model.fast.decode.choose", interrupt)
            with pytest.raises(KeyboardInterrupt):
                speaker.answer("hi", "", FEW, 0)
        assert speaker.turns == []
    assert answers(found) == expected
