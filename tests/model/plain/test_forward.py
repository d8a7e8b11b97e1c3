import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from palate.config import ModelConfig
from palate.model import (
    LoadedModel,
    Outputs,
    lm_outputs,
    load_model,
    micro_batches,
    ragged,
    row_sizes,
    scalar_outputs,
)
from palate.model.batched import batched_logps
from palate.model.fast.engine import FastEngine
from palate.testing import byte_tokenizer, tiny_model
from palate.types import Comparison, Completion, Demonstration, Example, Group, Pair, Prompt, Record

KINDS = ["llama", "gpt2", "qwen3"]


def load(directory: str, *, head: str = "lm", **options) -> LoadedModel:
    fixed = {"model": directory, "dtype": "float32", "device": "cpu", "lora": False}
    return load_model(ModelConfig.model_validate(fixed | options), head=head)


WAYS = [(kind, way) for kind in KINDS for way in ("packed", "padded")]


@pytest.fixture(scope="module", params=WAYS, ids="-".join)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model of each kind, computed by the fast way and by the plain one."""
    kind, way = request.param
    directory = tiny_model(tmp_path_factory.mktemp(kind), kind=kind, chat=True, initializer_range=0.1)
    model = load(directory, fast=way == "packed")
    assert isinstance(model.engine, FastEngine) == (way == "packed")
    return model


def again(model: LoadedModel, **options) -> LoadedModel:
    """The same model once more, to be changed."""
    return load(model.source, **{"fast": isinstance(model.engine, FastEngine)} | options)


def outputs_of(
    model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
) -> Outputs:
    """What a learner sees."""
    with model.computing():
        return model.outputs(records, statistics=statistics, top_logits=top_logits)


def records_of(model: LoadedModel) -> list[Record]:
    """Records of every sort, with rows of very different length, a cut completion and one-token ones."""
    codec = model.codec
    cut = codec.completion(Prompt("Q"), "left open")
    return [
        codec.pair(Comparison(Prompt("Hi"), "Hello there, how are you?", "no")),
        codec.example(Demonstration(Prompt("A much longer question, with many words in it"), "")),
        Group(
            Prompt("Q"),
            (
                codec.completion(Prompt("Q"), "one"),
                Completion("left ope", cut.token_ids[:-2], "length"),
                codec.completion(Prompt("Q"), "a third one that is longer"),
            ),
        ),
        codec.pair(Comparison(Prompt("Hi"), "", "x")),
    ]


def rows_of(model: LoadedModel, records: Sequence[Record]) -> list[tuple[list[int], int]]:
    """(all token ids, prompt length) of each completion."""
    return [
        ([*model.codec.prompt_ids(r.prompt), *c.token_ids], len(model.codec.prompt_ids(r.prompt)))
        for r in records
        for c in r.completions
    ]


def oracle(model: LoadedModel, records: Sequence[Record]) -> list[Tensor]:
    """Log-probabilities over the vocabulary at each completion token: one unpadded row at a time, float64."""
    network = copy.deepcopy(model.network).double()
    found = []
    with torch.no_grad():
        for ids, start in rows_of(model, records):
            logits = network(torch.tensor([ids])).logits[0].double()
            found.append(logits.log_softmax(-1)[start - 1 : len(ids) - 1])
    return found


def targets(records: Sequence[Record]) -> list[Tensor]:
    return [torch.tensor(c.token_ids) for r in records for c in r.completions]


# ---- log-probabilities ------------------------------------------------------------------------------------


def test_logps_equal_the_oracle(model: LoadedModel) -> None:
    records = records_of(model)
    got = outputs_of(model, records).logps
    assert got is not None
    assert got.values.dtype == torch.float32
    expected = [
        full.gather(-1, ids[:, None])[:, 0]
        for full, ids in zip(oracle(model, records), targets(records), strict=True)
    ]
    for row, other in zip(got.rows(), expected, strict=True):
        torch.testing.assert_close(row.detach().double(), other, atol=1e-5, rtol=0)
    # A mean counts the tokens there are, and a sum nothing else.
    torch.testing.assert_close(
        got.sum().double(), torch.stack([e.sum() for e in expected]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        got.mean().double(), torch.stack([e.mean() for e in expected]), atol=1e-5, rtol=0
    )


def test_masks_come_from_lengths(model: LoadedModel) -> None:
    # The end token, which is the padding as well, counts.
    records = records_of(model)
    got = outputs_of(model, records).logps
    assert got is not None
    assert got.mask.sum(-1).tolist() == [len(ids) for ids in targets(records)]
    assert got.mask.dtype == torch.bool
    assert (got.values[~got.mask] == 0).all()


def test_entropy_and_top1_equal_the_oracle(model: LoadedModel) -> None:
    records = records_of(model)
    got = outputs_of(model, records, statistics=True)
    assert got.entropy is not None
    assert got.top1 is not None
    # So that top1 is no row of zeros: the likeliest token of each place is one of the targets.
    greedy = [
        Group(r.prompt, tuple(Completion("", tuple(row.argmax(-1).tolist())) for row in rows))
        for r, rows in _by_record(records, oracle(model, records))
    ]
    first_tokens = outputs_of(model, greedy, statistics=True).top1
    assert first_tokens is not None
    assert (first_tokens.values[:, 0] == 1).all()
    for entropy, top1, full, ids in zip(
        got.entropy.rows(), got.top1.rows(), oracle(model, records), targets(records), strict=True
    ):
        closed = -(full.exp() * full).sum(-1)
        torch.testing.assert_close(entropy.double(), closed, atol=1e-5, rtol=0)
        assert torch.equal(top1, (full.argmax(-1) == ids).float())
    assert not got.entropy.values.requires_grad
    assert not got.top1.values.requires_grad


def _by_record(records: Sequence[Record], rows: list[Tensor]) -> list[tuple[Record, list[Tensor]]]:
    rest = iter(rows)
    return [(r, list(itertools.islice(rest, len(r.completions)))) for r in records]


def test_a_model_that_knows_nothing(model: LoadedModel) -> None:
    # All weights zero: every logit is zero, every token has 1/259 and the entropy is log 259.
    blank = again(model)
    with torch.no_grad():
        for parameter in blank.network.parameters():
            parameter.zero_()
    got = outputs_of(blank, records_of(blank), statistics=True)
    assert got.logps is not None
    assert got.entropy is not None
    torch.testing.assert_close(
        torch.cat(got.logps.rows()), torch.full((int(got.logps.mask.sum()),), -math.log(259))
    )
    torch.testing.assert_close(got.entropy.rows()[0], torch.full((26,), math.log(259)))


def test_nothing_else_in_the_batch_changes_a_row(model: LoadedModel) -> None:
    records = records_of(model)
    together = outputs_of(model, records).logps.rows()
    turned = outputs_of(model, records[::-1]).logps.rows()
    alone = [row for r in records for row in outputs_of(model, [r]).logps.rows()]
    whole = [row for _, rows in _by_record(records, together) for row in rows]
    back = [row for _, rows in reversed(_by_record(records[::-1], turned)) for row in rows]
    for one, other, third in zip(whole, back, alone, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
        torch.testing.assert_close(one, third, atol=1e-5, rtol=0)


@pytest.mark.parametrize("budget", [1, 60, 150, 10_000])
def test_micro_batches_change_nothing(model: LoadedModel, budget: int) -> None:
    records = records_of(model)
    with torch.no_grad():
        whole = outputs_of(model, records).logps
        parts = batched_logps(model, records, budget)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-5, rtol=0)
    assert torch.equal(parts.mask, whole.mask)


def test_a_network_that_cannot_leave_out_logits_gives_the_same(model: LoadedModel) -> None:
    records = records_of(model)
    assert model.keeps_logits
    plain = load(model.source, fast=False)
    plain.__dict__["keeps_logits"] = False
    torch.testing.assert_close(
        lm_outputs(plain, records).logps.values, lm_outputs(model, records).logps.values, atol=1e-6, rtol=0
    )


def test_gradient_equals_the_oracles(model: LoadedModel, same_gradients: Callable[..., None]) -> None:
    records = records_of(model)
    live, exact = again(model), again(model, fast=False).network.double()
    # The weights of tokens differ, as those of chosen and rejected do.
    weigh = torch.linspace(-1, 1, 8)
    with live.computing():
        (live.outputs(records, statistics=True).logps.sum() * weigh).sum().backward()
    for (ids, start), wanted, weight in zip(rows_of(model, records), targets(records), weigh, strict=True):
        logps = exact(torch.tensor([ids])).logits[0].log_softmax(-1)[start - 1 : -1]
        (weight.double() * logps.gather(-1, wanted[:, None]).sum()).backward()
    same_gradients(*({n: p.grad.double() for n, p in m.named_parameters()} for m in (live.network, exact)))


def test_bfloat16_weights_give_float32_numbers(model: LoadedModel) -> None:
    small = again(model, dtype="bfloat16")
    records = records_of(model)
    got = outputs_of(small, records).logps
    assert got.values.dtype == torch.float32
    torch.testing.assert_close(got.values, outputs_of(model, records).logps.values, atol=0.1, rtol=0)


# ---- single logits --------------------------------------------------------------------------------------


def raw_oracle(model: LoadedModel, records: Sequence[Record]) -> list[Tensor]:
    """As `oracle`, the logits themselves."""
    network = copy.deepcopy(model.network).double()
    with torch.no_grad():
        return [
            network(torch.tensor([ids])).logits[0, start - 1 : len(ids) - 1]
            for ids, start in rows_of(model, records)
        ]


def test_single_logits_equal_the_oracle(model: LoadedModel) -> None:
    records = records_of(model)
    got = outputs_of(model, records, top_logits=4)
    assert got.top_logits.shape == (*got.logps.mask.shape, 4)
    assert got.top_logits.dtype == torch.float32
    for i, (full, ids) in enumerate(zip(raw_oracle(model, records), targets(records), strict=True)):
        count = len(ids)
        target = full.gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(got.target_logits.rows()[i].double(), target, atol=1e-4, rtol=0)
        best = full.topk(4, dim=-1)
        torch.testing.assert_close(got.top_logits[i, :count].double(), best.values, atol=1e-4, rtol=0)
        assert torch.equal(got.top_tokens[i, :count], best.indices)
        assert (got.top_logits[i, count:] == 0).all()
    assert torch.equal(got.target_logits.mask, got.logps.mask)
    assert got.entropy is None


def test_logits_come_only_where_they_are_asked_for(model: LoadedModel) -> None:
    got = outputs_of(model, records_of(model), statistics=True)
    assert got.target_logits is got.top_logits is got.top_tokens is None


def test_outputs_of_some_completions(model: LoadedModel) -> None:
    whole = outputs_of(model, records_of(model), top_logits=2)
    some = whole.take(torch.tensor([4, 0]))
    assert torch.equal(some.logps.values, whole.logps.values[[4, 0]])
    assert torch.equal(some.logps.mask, whole.logps.mask[[4, 0]])
    assert torch.equal(some.target_logits.values, whole.target_logits.values[[4, 0]])
    assert torch.equal(some.top_logits, whole.top_logits[[4, 0]])
    assert torch.equal(some.top_tokens, whole.top_tokens[[4, 0]])
    assert some.entropy is None
    assert some.scores is None


# ---- micro_batches ---------------------------------------------------------------------------------

SIZES = st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=4), max_size=25)


@given(SIZES, st.integers(1, 300))
@settings(max_examples=200, deadline=None)
def test_micro_batches_hold_every_record_once_within_the_budget(sizes: list[list[int]], budget: int) -> None:
    batches = micro_batches(sizes, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        rows = [size for i in batch for size in sizes[i]]
        assert len(rows) * max(rows) <= budget or len(batch) == 1
    # None is needlessly small: the first record of the next one did not fit.
    for batch, following in itertools.pairwise(batches):
        rows = [size for i in (*batch, following[0]) for size in sizes[i]]
        assert len(rows) * max(rows) > budget


@given(SIZES, st.integers(1, 300), st.randoms())
@settings(max_examples=100, deadline=None)
def test_micro_batches_follow_from_lengths_alone(sizes: list[list[int]], budget: int, random) -> None:
    # Else a resumed run, or the reference's pass, would put batches together in another way.
    batches = micro_batches(sizes, budget)
    assert batches == micro_batches([list(s) for s in sizes], budget)
    # Records of one size are told apart by their place, so only one-row records can be shuffled.
    ones = [[max(s)] for s in sizes]
    turned = ones.copy()
    random.shuffle(turned)

    def shape(of: list[list[int]]) -> list[list[int]]:
        return [[of[i][0] for i in batch] for batch in micro_batches(of, budget)]

    assert shape(turned) == shape(ones)


def test_row_sizes(model: LoadedModel) -> None:
    records = records_of(model)
    lengths = iter(len(ids) for ids, _ in rows_of(model, records))
    assert row_sizes(records, model.codec) == [[next(lengths) for _ in r.completions] for r in records]


def test_ragged_rows() -> None:
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0]), torch.tensor([4.0, 0.0, 6.0])]
    made = ragged(rows)
    assert made.values.tolist() == [[1, 2, 0], [3, 0, 0], [4, 0, 6]]
    assert made.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert all(map(torch.equal, made.rows(), rows))
    assert made.sum().tolist() == [3, 3, 10]
    assert made.mean().tolist() == pytest.approx([1.5, 3, 10 / 3])


# ---- scalar_outputs --------------------------------------------------------------------------------


def classifier(directory: Path, kind: str, pad: int | None) -> LoadedModel:
    """A scalar head on a tiny model whose configuration and tokenizer pad with `pad`."""
    tiny_model(directory, kind=kind, chat=True)
    tokenizer = byte_tokenizer(chat=True, pad_is_end=pad == 257)
    if pad is None:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(path.read_text().replace('"pad_token_id": 256', f'"pad_token_id": {pad or "null"}'))
    return load(str(directory), head="scalar")


@pytest.mark.parametrize("pad", [256, 257, None], ids=["pad", "pad-is-end", "no-pad"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_transformers(tmp_path: Path, kind: str, pad: int | None) -> None:
    # Transformers reads the last token that is not padding. The end token is the last, and must not be
    # taken for padding, by us or by whoever loads what we have saved.
    scored = classifier(tmp_path / "base", kind, pad)
    records = records_of(scored)
    with torch.no_grad():
        got = scalar_outputs(scored, records).scores
    assert got is not None
    assert got.dtype == torch.float32
    scored.save(tmp_path / "saved")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    rows = [ids for ids, _ in rows_of(scored, records)]
    with torch.no_grad():
        for score, ids in zip(got, rows, strict=True):
            hidden = theirs.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(score, theirs.score(hidden)[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(score, theirs(torch.tensor([ids])).logits[0, 0], atol=1e-5, rtol=0)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
        batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
        padded = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(padded, got, atol=1e-5, rtol=0)
    assert len(set(got.tolist())) == len(rows)


def test_scores_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    scored = classifier(tmp_path, "llama", 257)
    records = records_of(scored)
    with torch.no_grad():
        together = scalar_outputs(scored, records).scores
        alone = torch.cat([scalar_outputs(scored, [r]).scores for r in records])
        turned = torch.cat([scalar_outputs(scored, [r]).scores for r in records[::-1]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.shape == (7 + 1,)
    assert sorted(turned.tolist()) == pytest.approx(sorted(alone.tolist()))
    pair = records[0]
    assert isinstance(pair, Pair)
    turned_pair = Pair(pair.prompt, pair.rejected, pair.chosen)
    with torch.no_grad():
        one, other = scalar_outputs(scored, [pair]).scores, scalar_outputs(scored, [turned_pair]).scores
    torch.testing.assert_close(one, other.flip(0), atol=1e-5, rtol=0)


def test_a_scalar_heads_bias_counts(tmp_path: Path) -> None:
    cfg = ModelConfig(model=tiny_model(tmp_path), dtype="float32", device="cpu", lora=False)
    model = load_model(cfg, head="scalar")
    prompt = Prompt("hi")
    records = [Example(prompt, model.codec.completion(prompt, "yes"))]
    without = scalar_outputs(model, records).scores
    model.network.score.bias = torch.nn.Parameter(torch.tensor([2.5]))
    torch.testing.assert_close(scalar_outputs(model, records).scores, without + 2.5)
