"""Checkpoints of Palate in plain transformers and peft: the same logits, scores and ends, for each family."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from palate.annotate import RewardModel
from palate.config import ModelConfig, Sampling
from palate.model import LoadedModel, load_model
from palate.model.rollouts import sample
from palate.testing import KINDS, byte_tokenizer, tiny_model
from palate.types import Completion, Prompt

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

STATE_SPACE: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "intermediate_size": 64},
    "falcon_h1": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
}
"""Families with state-space layers, which most other tests leave out."""

ENDS = [257, *(i for i in range(256) if i % 4)]
"""Most tokens end a completion, so that random models do end."""


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of tiny models with a chat template, made once; their numbers are far apart."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = place = tmp_path_factory.mktemp(kind)
            if kind in STATE_SPACE:
                ids = {"vocab_size": 259, "bos_token_id": 258, "eos_token_id": 257, "pad_token_id": 256}
                config = AutoConfig.for_model(kind, **ids, **STATE_SPACE[kind], initializer_range=0.2)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    AutoModelForCausalLM.from_config(config).save_pretrained(place)
                byte_tokenizer(chat=True).save_pretrained(place)
            else:
                tiny_model(place, kind=kind, chat=True, initializer_range=0.2)
            path = place / "generation_config.json"
            path.write_text(json.dumps({"eos_token_id": ENDS}))
        return made[kind]

    return make


def trained(directory: Path, *, lora: bool, head: str = "lm") -> LoadedModel:
    """A model whose trained weights have moved, as after some steps."""
    fixed = {"model": str(directory), "dtype": "float32", "device": "cpu", "lora": lora, "lora_rank": 4}
    model = load_model(ModelConfig.model_validate(fixed), head=head)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in model.trained():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    model.revision += 1
    return model


@torch.no_grad()
def logits(network: nn.Module, ids: list[list[int]], **options: Tensor) -> Tensor:
    found: Tensor = network.eval()(input_ids=torch.tensor(ids), **options).logits
    return found


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, *STATE_SPACE])
def test_a_language_model(directory_of: Callable[[str], Path], tmp_path: Path, kind: str, lora: bool) -> None:
    model = trained(directory_of(kind), lora=lora)
    prompts = [Prompt(text) for text in ("Hi there", "The sea", "Once", "Why?", "9", "Zed")]
    greedy = Sampling(temperature=0, max_new_tokens=24)
    groups = sample(model, prompts, 1, greedy, seed=0, version=0)
    model.save(tmp_path)
    auto = AutoPeftModelForCausalLM if lora else AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == model.codec.end_ids == set(ENDS)
    ended = 0
    for group in groups:
        turns = [{"role": "user", "content": group.prompt.content}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
        said = (
            theirs.eval()
            .generate(
                **ids,
                eos_token_id=generation["eos_token_id"],
                pad_token_id=256,
                do_sample=False,
                max_new_tokens=24,
            )[0]
            .tolist()
        )
        before = len(ids["input_ids"][0])
        assert tuple(said[before:]) == group.completions[0].token_ids
        ended += group.completions[0].finish == "eos"
        # peft adds rows for tokens that a tokenizer class adds to its vocabulary.
        found = logits(theirs, [said])[..., :259]
        torch.testing.assert_close(found, logits(model.network, [said]), atol=2e-5, rtol=0)
    assert ended


SCORED = [("Hi there", "Hello."), ("The sea", ""), ("Once", "upon a time there was a word")]


def rendered(directory: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return [
        list(tokenizer.apply_chat_template([
            {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
        ])["input_ids"])
        for prompt, completion in SCORED
    ]  # fmt: skip


def ours(directory: Path) -> list[float | None]:
    model = RewardModel.load(str(directory), device="cpu", dtype="float32")
    prompts = [Prompt(prompt) for prompt, _ in SCORED]
    return model(prompts, [Completion(text, (257,)) for _, text in SCORED])


def theirs_in_a_batch(network: nn.Module, directory: Path) -> list[float]:
    """Scores of transformers for one batch, padded as the saved tokenizer says."""
    batch = AutoTokenizer.from_pretrained(directory).pad(
        {"input_ids": rendered(directory)}, padding_side="right", return_tensors="pt"
    )
    with torch.no_grad():
        return [float(x) for x in network.eval()(**batch).logits[:, 0]]


def has_classifier(kind: str) -> bool:
    config = AutoConfig.for_model(kind)
    return type(config) in AutoModelForSequenceClassification._model_mapping


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if has_classifier(kind)])
def test_a_reward_model(directory_of: Callable[[str], Path], tmp_path: Path, kind: str, lora: bool) -> None:
    model = trained(directory_of(kind), lora=lora, head="scalar")
    model.save(tmp_path)
    pad = AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    if lora:
        network = AutoPeftModelForSequenceClassification.from_pretrained(
            tmp_path, num_labels=1, pad_token_id=pad, dtype=torch.float32
        )
    else:
        network = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    scores = ours(tmp_path)
    assert scores == pytest.approx(theirs_in_a_batch(network, tmp_path), abs=2e-5)
    assert len({round(float(score or 0), 3) for score in scores}) > 1


@pytest.mark.parametrize("pad", ["end", "another"])
def test_an_adapter_for_a_classifier_loads_in_transformers(
    directory_of: Callable[[str], Path], tmp_path: Path, pad: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(directory_of("llama"), base)
    if pad == "end":  # the tokenizer and the model pad with the end token
        byte_tokenizer(chat=True, pad_is_end=True).save_pretrained(base)
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(config | {"pad_token_id": 257}))
    saved = tmp_path / "saved"
    trained(base, lora=True, head="scalar").save(saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.pad_token_id not in ENDS
    network = AutoModelForSequenceClassification.from_pretrained(
        saved, num_labels=1, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
    )
    assert ours(saved) == pytest.approx(theirs_in_a_batch(network, saved), abs=2e-5)


# ---- Published reward models: read where transformers reads their template's rendering ----------------

TEMPLATES = {
    "ends with the end token": "{{ m['content'] }}<end>",
    "a new line after it": "{{ m['content'] }}<end>\n",
    "words after it": "{{ m['content'] }}<end>{{ '\nHow good was that?' if m['role'] == 'assistant' }}",
    "no end token": "{{ m['content'] }}\n",
    "two end tokens": "{{ m['content'] }}<end><end>",
}


@pytest.mark.parametrize("pad", [256, 257, None])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_published_reward_model(tmp_path: Path, template: str, pad: int | None) -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=259,
        bos_token_id=258,
        eos_token_id=257,
        pad_token_id=pad,
        num_labels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer(pad_is_end=pad == 257)
    tokenizer.chat_template = (
        "{% for m in messages %}<bos>{{ m['role'] }}:" + TEMPLATES[template] + "{% endfor %}"
        "{% if add_generation_prompt %}<bos>assistant:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = [float(logits(network, [ids])[0, 0]) for ids in rendered(tmp_path)]
    assert ours(tmp_path) == pytest.approx(wanted, abs=1e-5)
