"""The fast ways against the plain ones, which are their oracle."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from palate.config import ModelConfig, Sampling
from palate.learn import Policy
from palate.model import LoadedModel, lm_outputs, load_model
from palate.model.batched import batched_logps, batched_scores
from palate.model.fast.attention import Attention
from palate.model.fast.decode import KeyValueStore
from palate.model.fast.engine import FastEngine
from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, ending, positions, predicting
from palate.model.fast.packed import packed_batches
from palate.model.plain.engine import PlainEngine
from palate.model.rollouts import sample
from palate.testing import KINDS, tiny_model, tiny_policy
from palate.types import Group, Prompt

FAST = [kind for kind in KINDS if kind != "bloom"]
"""Bloom's layers compute attention by themselves, so it must fall back to the plain path."""


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Directories of tiny models, made once. A wide start, so that greedy choices are no ties."""
    made: dict[str, str] = {}

    def make(kind: str) -> str:
        if kind not in made:
            made[kind] = tiny_model(tmp_path_factory.mktemp(kind), kind=kind, initializer_range=0.2)
        return made[kind]

    return make


def load(directory: str, **options: object) -> LoadedModel:
    cfg = ModelConfig.model_validate({"model": directory, "dtype": "float32", "device": "cpu"} | options)
    return load_model(cfg, trainable=False)


def texts(seed: int, size: int) -> str:
    return "".join(random.Random(seed).choices("abcdefgh ", k=size))


def groups(model: LoadedModel) -> list[Group]:
    """Prompts shorter and longer than the sliding windows (8), completions from one token on."""
    found = []
    for i, (prompt_size, sizes) in enumerate([(3, (5, 1)), (30, (12, 20)), (1, (9, 9)), (12, (1, 30))]):
        prompt = Prompt(texts(i, prompt_size))
        answers = [model.codec.completion(prompt, texts(100 + i * 10 + j, n)) for j, n in enumerate(sizes)]
        found.append(Group(prompt, tuple(answers)))
    return found


@pytest.mark.parametrize("kind", FAST)
def test_logps_and_gradients_are_those_of_the_padded_way(
    kind: str, directory_of: Callable[[str], str], same_gradients: Callable[..., None]
) -> None:
    policy = tiny_policy(Path(directory_of(kind)), model={"lora": False})
    model = policy.model
    assert isinstance(model.engine, FastEngine)
    records = groups(model)
    weights = torch.randn(8, generator=torch.Generator().manual_seed(0))

    def outcome(fast: bool) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        model.network.zero_grad()
        with model.computing():
            outputs = model.outputs(records, statistics=True) if fast else None
            if outputs is not None:
                assert outputs.logps is not None
                (outputs.logps.sum() * weights).sum().backward()
        if outputs is None:
            outputs = lm_outputs(model, records, statistics=True)
            assert outputs.logps is not None
            (outputs.logps.sum() * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.network.named_parameters() if p.grad is not None}
        assert outputs.logps and outputs.entropy and outputs.top1  # noqa: PT018
        return outputs.logps.values.detach(), outputs.entropy.values, outputs.top1.values, gradients

    fast, plain = outcome(True), outcome(False)
    torch.testing.assert_close(fast[0], plain[0], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(fast[1], plain[1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(fast[2], plain[2])
    same_gradients(fast[3], plain[3])


@pytest.mark.parametrize("kind", FAST)
def test_greedy_tokens_are_those_of_generate(kind: str, directory_of: Callable[[str], str]) -> None:
    model = load(directory_of(kind))
    assert isinstance(model.engine, FastEngine)
    prompts = [Prompt(texts(i, size)) for i, size in enumerate((3, 40, 12, 1))]
    found = sample(model, prompts, 1, Sampling(temperature=0, max_new_tokens=24), seed=0, version=0)
    reference = AutoModelForCausalLM.from_pretrained(directory_of(kind), dtype=torch.float32).eval()
    for group in found:
        ids = torch.tensor([model.codec.prompt_ids(group.prompt)])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=256
        )
        tokens = group.completions[0].token_ids
        assert tuple(out[0, ids.shape[1] :].tolist()[: len(tokens)]) == tokens


@pytest.mark.parametrize("kind", FAST)
@pytest.mark.parametrize("cut", [{"top_k": 50}, {"top_p": 0.95}], ids=["top_k", "top_p"])
def test_both_engines_sample_the_same(
    kind: str, cut: dict[str, float], directory_of: Callable[[str], str]
) -> None:
    fast, plain = load(directory_of(kind)), load(directory_of(kind), fast=False)
    prompts = [Prompt(texts(i, size)) for i, size in enumerate((3, 40, 12, 1, 7))]
    # Six rows at a time for fifteen: slots are refilled while others go on.
    fixed = {"max_new_tokens": 24, "sampling_rows": 6, "temperature": 0.8, "repetition_penalty": 1.2}
    options = Sampling.model_validate(fixed | cut)
    ours = sample(fast, prompts, 3, options, seed=1, version=0)
    theirs = sample(plain, prompts, 3, options, seed=1, version=0)
    for a, b in zip(ours, theirs, strict=True):
        for one, other in zip(a.completions, b.completions, strict=True):
            assert one == other
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
            # The sum over a nucleus jumps where rounding puts one more token on either side of its edge; the
            # sum over the k likeliest does not, for the k-th and its follower are then equally likely.
            edge = 1e-4 if "top_k" in cut else 1e-2
            assert one.sampling_logps == pytest.approx(other.sampling_logps, abs=edge)


def test_a_model_that_bypasses_the_registry_takes_the_plain_way_and_says_so(
    directory_of: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="palate"):
        model = load(directory_of("bloom"))
    assert isinstance(model.engine, PlainEngine)
    (message,) = [record.getMessage() for record in caplog.records]
    assert "plain path" in message
    found = sample(model, [Prompt("hello")], 2, Sampling(max_new_tokens=5), seed=0, version=0)
    torch.testing.assert_close(
        batched_logps(model, found, 1000).rows()[0],
        torch.tensor(found[0].completions[0].logps),
        atol=1e-4,
        rtol=0,
    )


def test_a_head_that_scales_its_logits_takes_the_plain_way(tmp_path: Path) -> None:
    # Granite divides its logits: the probe must see that packed numbers are not the model's.
    from transformers import GraniteConfig, GraniteForCausalLM

    from palate.testing import byte_tokenizer

    config = GraniteConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=257, bos_token_id=258,
        pad_token_id=256,
        logits_scaling=8.0, initializer_range=0.2,
    )  # fmt: skip
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path)).engine, PlainEngine)


def test_a_saved_model_does_not_name_our_attention(
    directory_of: Callable[[str], str], tmp_path: Path
) -> None:
    policy = tiny_policy(Path(directory_of("llama")))
    with policy.model.computing():
        policy.save(tmp_path / "out")
    assert "palate" not in (tmp_path / "out" / "config.json").read_text()


def test_checkpointing_recomputes_the_packed_row(directory_of: Callable[[str], str]) -> None:
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy(Path(directory_of("mistral")), model={"checkpointing": checkpointing})
        policy.model.network.train(checkpointing)
        with policy.model.computing():
            logps = policy.model.outputs(groups(policy.model)).logps
            assert logps is not None
            logps.sum().sum().backward()
        found.append([p.grad.clone() for _, p in policy.model.trained()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def adapted(directory: str, **options: object) -> Policy:
    """A policy whose adapter does something."""
    policy = tiny_policy(Path(directory), model={"lora": True, **options})
    generator = torch.Generator().manual_seed(3)
    for name, parameter in policy.model.trained():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    policy.model.revision += 1
    return policy


def sampling_network(policy: Policy) -> Any:
    """The network that the fast engine samples from."""
    assert isinstance(policy.model.engine, FastEngine)
    return policy.model.engine.sampling_network(policy.model)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sampling_merges_the_adapter_and_follows_its_changes(
    kind: str, directory_of: Callable[[str], str]
) -> None:
    policy = adapted(directory_of(kind))
    plain = replace(policy.model, engine=PlainEngine())
    prompts, options = [Prompt("hello"), Prompt("you")], Sampling(max_new_tokens=16)
    for seed in range(2):
        fast = sample(policy.model, prompts, 2, options, seed=seed, version=0)
        assert fast == sample(plain, prompts, 2, options, seed=seed, version=0)
        for _, parameter in policy.model.trained():
            parameter.data = parameter.data * 1.5
        policy.model.revision += 1


def test_merging_changes_no_live_weight_and_copies_no_other(directory_of: Callable[[str], str]) -> None:
    policy = adapted(directory_of("llama"))
    before = {name: p.detach().clone() for name, p in policy.model.network.named_parameters()}
    merged = sampling_network(policy)
    for name, parameter in policy.model.network.named_parameters():
        assert torch.equal(parameter, before[name])
    live = {p.data_ptr() for p in policy.model.network.parameters()}
    own = {name for name, p in merged.named_parameters() if p.data_ptr() not in live}
    assert own == {name for name in own if name.endswith("proj.weight")}
    assert len(own) == 2 * 7  # two layers, seven matrices each


def test_with_the_adapter_off_the_base_is_sampled(directory_of: Callable[[str], str]) -> None:
    policy = adapted(directory_of("llama"))
    base = load(directory_of("llama"))
    options = Sampling(max_new_tokens=16)
    with policy.model.without_adapter():
        ours = sample(policy.model, [Prompt("hello")], 2, options, seed=0, version=0)
    assert ours == sample(base, [Prompt("hello")], 2, options, seed=0, version=0)


# ---- the head --------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("train_head", [True, False])
def test_head_against_autograd_in_float64(
    softcap: float | None, bias: bool, train_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("palate.model.fast.head.TILE_BYTES", 4 * 3 * 11)  # three tokens a tile: 7 = 3 + 3 + 1
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=generator, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, requires_grad=train_head)
    offset = torch.randn(11, generator=generator, requires_grad=train_head) if bias else None
    targets = torch.randint(11, (7,), generator=generator)
    incoming = torch.randn(7, generator=generator)
    logps, entropy, top1 = LMHead(weight, offset, softcap).logps(hidden, targets, statistics=True)
    (logps * incoming).sum().backward()

    wanted = [t.detach().double().requires_grad_() for t in (hidden, weight, *([offset] if bias else []))]
    logits = wanted[0] @ wanted[1].T + (wanted[2] if bias else 0.0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    table = logits.log_softmax(-1)
    oracle = table.gather(-1, targets[:, None])[:, 0]
    (oracle * incoming.double()).sum().backward()
    torch.testing.assert_close(logps.double(), oracle, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(top1, (logits.argmax(-1) == targets).float())
    trained = [hidden, *([weight, *([offset] if bias else [])] if train_head else [])]
    for ours, theirs in zip(trained, wanted, strict=False):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=1e-5)


# ---- the layout ------------------------------------------------------------------------------------


def test_layout_by_hand() -> None:
    # prompt of 3 with completions of 2 and 1, prompt of 1 with one of 2: rows 0-2 | 3-4 | 5 | 6 | 7-8
    shape = [(3, (2, 1)), (1, (2,))]
    assert PackedLayout(shape).sizes == [3, 2, 1, 1, 2]
    assert positions(shape).tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert predicting(shape).tolist() == [2, 3, 2, 6, 7]


def test_packed_batches_keep_the_budget_and_every_record() -> None:
    batches = packed_batches([5, 50, 7, 3, 9, 5], 15)
    assert batches == [[3, 0], [5, 2], [4], [1]]


# ---- which models are let in -----------------------------------------------------------------------


def test_buffers_keep_their_precision_under_a_bfloat16_adapter(directory_of: Callable[[str], str]) -> None:
    for lora in (True, False):
        policy = tiny_policy(Path(directory_of("llama")), dtype="bfloat16", model={"lora": lora})
        assert {b.dtype for b in policy.model.network.buffers()} == {torch.float32}
        assert policy.model.dtype == torch.bfloat16


def test_a_bfloat16_adapter_is_not_merged(directory_of: Callable[[str], str]) -> None:
    # A young adapter changes weights by less than bfloat16 resolves: merged, most of it would be lost.
    policy = tiny_policy(Path(directory_of("llama")), dtype="bfloat16", model={"lora": True})
    assert sampling_network(policy) is policy.model.network


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_whose_layers_mix_neighbours_otherwise_takes_the_plain_way(
    dtype: str, tmp_path: Path
) -> None:
    # LFM2 has short convolutions, which would run across the segments of a packed row.
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from palate.testing import byte_tokenizer

    config = Lfm2Config(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=257, bos_token_id=258,
        pad_token_id=256, layer_types=["conv", "full_attention"], initializer_range=0.3,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path), dtype=dtype).engine, PlainEngine)


@pytest.mark.parametrize("windowed", [True, False])
def test_a_window_that_only_the_mask_knows_of_takes_the_plain_way(windowed: bool, tmp_path: Path) -> None:
    # Qwen2-MoE builds the mask of its window, and does not tell its attention.
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    from palate.testing import byte_tokenizer

    config = Qwen2MoeConfig(
        **SMALL, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, use_sliding_window=windowed, sliding_window=8, max_window_layers=2,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert isinstance(load(str(tmp_path)).engine, PlainEngine) == windowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores_are_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    # Biases of keys, as Qwen2 has them, make scores of hundreds, of which bfloat16 resolves only ones.
    torch.manual_seed(0)
    prompt, depth, heads, kv, size = 20, 3, 4, 2, 16
    query = (torch.randn(2, heads, 1, size) + 6).to(dtype)
    keys, values = (torch.randn(2, kv, prompt + depth + 1, size) for _ in range(2))
    keys[1, :, :prompt], values[1, :, :prompt] = keys[0, :, :prompt], values[0, :, :prompt]
    keys, values = (keys + 6).to(dtype), values.to(dtype)
    store = KeyValueStore(1, 2, prompt, depth + 1, torch.device("cpu"))
    store.prompt_lengths[0] = prompt
    for kept, all_of_it in zip(store.layer(0, keys[:1])[:2], (keys, values), strict=True):
        kept[0] = all_of_it[0, :, :prompt]
    how = Attention(size**-0.5, None, None)
    for at in range(depth + 1):  # a token of both rows at a time
        here = slice(prompt + at, prompt + at + 1)
        found = store.step([0, 1], [at, at]).attend(0, query, keys[:, :, here], values[:, :, here], how)
    exact = scaled_dot_product_attention(
        query.double(), keys.double(), values.double(), scale=size**-0.5, enable_gqa=True
    )
    # In float32, the rounding of a score of hundreds is a factor of the weight of its value.
    rounding = 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(exact.abs().max())
    torch.testing.assert_close(found[:, 0].double(), exact[:, :, 0], atol=rounding, rtol=0)


SMALL = {
    "vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 257,
    "bos_token_id": 258, "pad_token_id": 256, "initializer_range": 0.2,
}  # fmt: skip


def test_adapters_on_experts_are_not_merged(tmp_path: Path) -> None:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from palate.testing import byte_tokenizer

    config = OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2)
    OlmoeForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    policy = tiny_policy(tmp_path, model={"lora": True})
    assert sampling_network(policy) is policy.model.network
    (group,) = policy.snapshot().sample([Prompt("hello")], 2, Sampling(max_new_tokens=4), seed=0)
    assert len(group.completions) == 2


@pytest.mark.parametrize("kind", FAST)
def test_rounding_alone_keeps_no_model_out(kind: str, directory_of: Callable[[str], str]) -> None:
    assert isinstance(load(directory_of(kind), dtype="bfloat16").engine, FastEngine)


# ---- Scores ----------------------------------------------------------------------------------------


def classifier(directory: str, **options: object) -> LoadedModel:
    cfg = {"model": directory, "dtype": "float32", "device": "cpu", "lora": False} | options
    return load_model(ModelConfig.model_validate(cfg), head="scalar")


@pytest.mark.parametrize("kind", FAST)
def test_scores_and_gradients_are_those_of_the_padded_way(
    kind: str, directory_of: Callable[[str], str], same_gradients: Callable[..., None]
) -> None:
    model = classifier(directory_of(kind))
    assert isinstance(model.engine, FastEngine)
    records = groups(model)
    gradients = []
    found = []
    for way in (model, replace(model, engine=PlainEngine())):
        with way.computing():
            scores = way.scores(records).scores
            assert scores is not None
            model.network.zero_grad()
            (scores * torch.arange(1, len(scores) + 1)).sum().backward()
        found.append(scores.detach())
        gradients.append({name: p.grad for name, p in model.trained() if p.grad is not None})
    assert len(set(found[0].tolist())) == 8
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    same_gradients(*gradients)


def test_a_classifier_whose_layers_follow_no_layout_takes_the_plain_way(
    directory_of: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="palate"):
        assert isinstance(classifier(directory_of("bloom")).engine, PlainEngine)
    assert "falls back to the plain path" in caplog.text
    assert isinstance(classifier(directory_of("llama"), fast=False).engine, PlainEngine)
    assert isinstance(classifier(directory_of("bloom"), dtype="bfloat16").engine, PlainEngine)
    assert isinstance(classifier(directory_of("llama"), dtype="bfloat16").engine, FastEngine)


def test_scores_come_in_the_records_order_whatever_shares_a_row(directory_of: Callable[[str], str]) -> None:
    model = classifier(directory_of("llama"))
    records = groups(model)
    with torch.no_grad():
        together = batched_scores(model, records, 10_000)
        apart = batched_scores(model, records, 1)
        plain = batched_scores(replace(model, engine=PlainEngine()), records, 10_000)
    torch.testing.assert_close(together, apart, atol=1e-4, rtol=0)
    torch.testing.assert_close(together, plain, atol=1e-4, rtol=0)


def test_completions_end_where_their_last_token_is() -> None:
    shape = [(3, (2, 1)), (1, (4,)), (2, (0, 1))]
    assert ending(shape).tolist() == [4, 5, 10, 12, 13]
