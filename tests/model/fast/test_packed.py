from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from palate.config import ModelConfig
from palate.model import LoadedModel, Outputs, load_model
from palate.model.fast.engine import FastEngine
from palate.model.fast.packed import packed_batches
from palate.testing import tiny_model
from palate.types import Comparison, Completion, Example, Group, Prompt, Record

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

KINDS = ["llama", "gemma2", "gpt2", "phi"]
"""A tied head, one with soft caps, absolute positions, a head with a bias of its own."""


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def directory(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model(made[kind], kind=kind, initializer_range=0.1)
        return made[kind]

    return directory


def load(directory: Path, **options) -> LoadedModel:
    fixed = {"model": str(directory), "dtype": "float32", "device": "cpu", "lora": False}
    return load_model(ModelConfig.model_validate(fixed | options))


def records_of(model: LoadedModel) -> list[Record]:
    """Groups, pairs and single ones, one-token completions and a cut one among them."""
    codec, prompt = model.codec, Prompt("A question")
    whole = codec.completion(prompt, "left open")
    return [
        codec.pair(Comparison(Prompt("Hi"), "Hello there", "no")),
        Example(prompt, Completion("", (codec.end_id,))),
        Group(prompt, (whole, Completion("left", whole.token_ids[:4], "length"), Completion("x", (7,)))),
    ]


def everything(found: Outputs) -> Tensor:
    """A number that depends on every output that carries gradient, on no two of them alike."""
    noise = torch.Generator().manual_seed(0)
    parts = (found.logps.values, found.target_logits.values, found.top_logits)
    return sum((part * torch.randn(part.shape, generator=noise)).sum() for part in parts)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_plain(
    kind: str, lora: bool, directory_of: Callable[[str], Path], same_gradients: Callable[..., None]
) -> None:
    gradients, outputs = [], []
    for fast in (True, False):
        model = load(directory_of(kind), lora=lora, fast=fast)
        assert isinstance(model.engine, FastEngine) == fast
        noise = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, parameter in model.trained():  # off the start, where half of an adapter has no gradient
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
        records = records_of(model)
        with model.computing():
            found = model.outputs(records, statistics=True, top_logits=3)
            everything(found).backward()
        outputs.append(found)
        gradients.append({name: p.grad for name, p in model.trained()})
    packed, plain = outputs
    for name in ("logps", "entropy", "top1", "target_logits"):
        ours, theirs = getattr(packed, name), getattr(plain, name)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)
        assert torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(packed.top_logits, plain.top_logits, atol=1e-4, rtol=0)
    assert torch.equal(packed.top_tokens, plain.top_tokens)
    same_gradients(*gradients)


# ---- packed_batches --------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 200), max_size=25), st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_packed_batches_hold_every_record_once_within_the_budget(sizes: list[int], budget: int) -> None:
    batches = packed_batches(sizes, budget)
    assert batches == packed_batches(list(sizes), budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert sum(sizes[i] for i in batch) <= budget or len(batch) == 1
    # There are as few rows as filling them in turn needs, and no smaller budget needs as few.
    filled, tokens = 0, budget + 1
    for size in sorted(sizes):
        tokens += size
        if tokens > budget:
            filled, tokens = filled + 1, size
    assert len(batches) == filled
    if longest := max((sum(sizes[i] for i in batch) for batch in batches if len(batch) > 1), default=0):
        assert len(packed_batches(sizes, longest - 1)) > len(batches)
