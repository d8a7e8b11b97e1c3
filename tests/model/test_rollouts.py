import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from palate.config import ModelConfig, Sampling
from palate.errors import DataError
from palate.journal import Journal
from palate.model import LoadedModel, lm_outputs, load_model
from palate.model.fast.engine import FastEngine
from palate.model.rollouts import FEW_ROWS, MOST_BYTES, MOST_ROWS, parallel_rows, sample
from palate.model.rows import Row
from palate.model.sampling import restricted_logps
from palate.testing import tiny_model
from palate.types import Completion, Group, Prompt

END_ID = 257

PROMPTS = [
    Prompt("Hello"),
    Prompt("A much longer prompt, to be padded against"),
    Prompt("?"),
    Prompt("Once upon"),
]


def load(directory: str, engine: str = "fast") -> LoadedModel:
    cfg = ModelConfig(model=directory, dtype="float32", device="cpu", fast=engine == "fast")
    model = load_model(cfg, trainable=False)
    assert isinstance(model.engine, FastEngine) == (engine == "fast")
    return model


# A wide start makes the logits differ enough that greedy choices are no ties.
KINDS = [(kind, chat) for kind in ("llama", "gpt2", "qwen3") for chat in (True, False)]


@pytest.fixture(scope="module", params=["fast", "plain"])
def engine(request: pytest.FixtureRequest) -> str:
    """Which of the two engines samples; both must do all of this."""
    return request.param


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{'chat' if p[1] else 'plain'}")
def any_model(
    request: pytest.FixtureRequest, engine: str, tmp_path_factory: pytest.TempPathFactory
) -> LoadedModel:
    kind, chat = request.param
    return load(
        tiny_model(tmp_path_factory.mktemp(kind), kind=kind, chat=chat, initializer_range=0.2), engine
    )


@pytest.fixture(scope="module")
def model(engine: str, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_model(tmp_path_factory.mktemp("llama"), chat=True, initializer_range=0.2), engine)


@pytest.fixture(scope="module")
def ending(engine: str, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model with 20 end tokens: a completion ends after some 12 tokens, and by different tokens."""
    directory = tiny_model(tmp_path_factory.mktemp("ending"), initializer_range=0.05)
    (Path(directory) / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [END_ID, *range(100, 119)]})
    )
    return load(directory, engine)


def draws(model: LoadedModel, prompts=PROMPTS, n: int = 2, *, seed: int = 0, **options) -> list[Group]:
    return sample(model, prompts, n, Sampling(**{"max_new_tokens": 12} | options), seed=seed, version=3)


def tokens(groups: list[Group]) -> list[tuple[int, ...]]:
    return [c.token_ids for group in groups for c in group.completions]


# ---- what is drawn ---------------------------------------------------------------------------------


def test_greedy_equals_generate_row_by_row(any_model: LoadedModel) -> None:
    groups = draws(any_model, n=1, temperature=0, max_new_tokens=20)
    # Loaded apart, so that nothing the loader does to the network is on both sides.
    reference = AutoModelForCausalLM.from_pretrained(any_model.source, dtype=torch.float32)
    for group in groups:
        prompt = torch.tensor([any_model.codec.prompt_ids(group.prompt)])
        out = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=20,
            eos_token_id=END_ID,
            pad_token_id=0,
        )
        assert group.completions[0].token_ids == tuple(out[0, prompt.shape[1] :].tolist())
    assert len(set(tokens(groups))) > 1  # the prompts do count


def test_completions_do_not_depend_on_what_shares_the_batch(any_model: LoadedModel) -> None:
    together = draws(any_model, n=3, top_p=0.95)
    by_row = draws(any_model, n=3, top_p=0.95, sampling_rows=1)
    by_two, by_five = (draws(any_model, n=3, top_p=0.95, sampling_rows=rows) for rows in (2, 5))
    assert together == by_row == by_two == by_five
    turned = draws(any_model, PROMPTS[::-1], n=3, top_p=0.95)
    assert turned == together[::-1]
    for prompt, group in zip(PROMPTS, together, strict=True):
        (alone,) = draws(any_model, [prompt], n=3, top_p=0.95)
        assert alone == group
        for one, other in zip(alone.completions, group.completions, strict=True):
            assert one.logps == pytest.approx(other.logps, abs=1e-4)
            assert one.sampling_logps == pytest.approx(other.sampling_logps, abs=1e-4)


def test_more_samples_keep_the_first_ones(model: LoadedModel) -> None:
    for few, many in zip(draws(model, n=2), draws(model, n=5), strict=True):
        assert few.completions == many.completions[:2]
        assert len(set(tokens([many]))) == 5


def test_repeated_prompts_get_samples_of_their_own(model: LoadedModel) -> None:
    twice = draws(model, [Prompt("Hello"), Prompt("?"), Prompt("Hello")])
    assert not set(tokens(twice[:1])) & set(tokens(twice[2:]))
    assert twice[:2] == draws(model, [Prompt("Hello"), Prompt("?")])


def test_the_seed_decides(model: LoadedModel) -> None:
    torch.manual_seed(1)
    first = draws(model, seed=1)
    torch.manual_seed(2)
    assert draws(model, seed=1) == first
    assert not set(tokens(draws(model, seed=2))) & set(tokens(first))


def test_nothing_global_is_drawn_from(model: LoadedModel) -> None:
    before = torch.random.get_rng_state()
    draws(model)
    assert torch.equal(before, torch.random.get_rng_state())


def test_groups_come_in_order(model: LoadedModel) -> None:
    groups = draws(model, n=3)
    assert [g.prompt for g in groups] == PROMPTS
    assert all(len(g.completions) == 3 and g.rewards is None for g in groups)
    assert {c.policy_version for g in groups for c in g.completions} == {3}


# ---- log-probabilities -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.5}], ids=str
)
def test_logps_are_those_of_the_learner(any_model: LoadedModel, options: dict) -> None:
    # Of the model as it is, whatever restricts the draw: the commonest silent error of online methods.
    groups = draws(any_model, n=3, **options)
    with torch.no_grad():
        expected = lm_outputs(any_model, groups).logps
    assert expected is not None
    for completion, row in zip((c for g in groups for c in g.completions), expected.rows(), strict=True):
        assert completion.logps == pytest.approx(row.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.7, "temperature": 0.5},
        {"min_new_tokens": 4},
    ],
    ids=str,
)
def test_sampling_logps_are_those_of_the_restricted_distribution(ending: LoadedModel, options: dict) -> None:
    # Recomputed token by token from one forward pass over the unpadded row.
    sampling = Sampling(max_new_tokens=12, **options)
    end_ids = sorted(ending.codec.end_ids)
    for group in draws(ending, **options):
        prompt = ending.codec.prompt_ids(group.prompt)
        for completion in group.completions:
            ids = [*prompt, *completion.token_ids]
            with torch.no_grad():
                logits = ending.network(torch.tensor([ids])).logits[0]
            for t, token in enumerate(completion.token_ids):
                at = len(prompt) + t
                seen = torch.zeros(1, 259, dtype=torch.bool)
                seen[0, ids[:at]] = True
                barred = torch.zeros(1, 259, dtype=torch.bool)
                barred[0, end_ids] = t < sampling.min_new_tokens
                row = restricted_logps(logits[at - 1 : at], sampling, seen=seen, barred=barred)
                assert completion.sampling_logps[t] == pytest.approx(float(row[0, token]), abs=1e-4)


def test_without_restrictions_both_are_the_same(model: LoadedModel) -> None:
    for group in draws(model):
        for completion in group.completions:
            assert completion.logps == pytest.approx(completion.sampling_logps, abs=1e-5)


def test_repetition_penalty_counts_no_padding(ending: LoadedModel) -> None:
    # Rows are padded with the end token: were padding counted as seen, a padded row would end less often.
    prompts = [Prompt("a"), Prompt("b" * 40)]
    assert ending.codec.end_id not in ending.codec.prompt_ids(prompts[0])
    together = draws(ending, prompts, n=8, repetition_penalty=3.0)
    alone = draws(ending, prompts, n=8, repetition_penalty=3.0, sampling_rows=1)
    assert together == alone
    assert together != draws(ending, prompts, n=8)
    for one, other in zip(together[0].completions, alone[0].completions, strict=True):
        assert one.sampling_logps == pytest.approx(other.sampling_logps, abs=1e-4)


def test_generation_defaults_of_the_model_do_not_count(engine: str, tmp_path: Path) -> None:
    directory = Path(tiny_model(tmp_path, initializer_range=0.2))
    plain = draws(load(str(directory), engine), n=4)
    config = json.loads((directory / "generation_config.json").read_text())
    habits = {
        "do_sample": True,
        "temperature": 0.1,
        "top_k": 2,
        "top_p": 0.2,
        "repetition_penalty": 9.0,
        "no_repeat_ngram_size": 1,
        "max_length": 3,
        "min_new_tokens": 11,
        "suppress_tokens": list(range(200)),
    }
    (directory / "generation_config.json").write_text(json.dumps(config | habits))
    assert draws(load(str(directory), engine), n=4) == plain


# ---- where completions end -------------------------------------------------------------------------


def test_a_completion_ends_at_an_end_token_or_at_the_limit(ending: LoadedModel) -> None:
    completions = [c for g in draws(ending, n=16) for c in g.completions]
    finished = [c for c in completions if c.finish == "eos"]
    cut = [c for c in completions if c.finish == "length"]
    assert len(finished) > 5
    assert len(cut) > 5
    assert len(finished) + len(cut) == len(completions)
    end_ids = ending.codec.end_ids
    for completion in finished:
        assert completion.token_ids[-1] in end_ids
        assert not end_ids & set(completion.token_ids[:-1])
        # The end token is learnt and not shown, even one that would show as text.
        assert completion.text == ending.codec.text(completion.token_ids[:-1])
    assert {c.token_ids[-1] for c in finished} - {END_ID}
    for completion in cut:
        assert len(completion.token_ids) == 12
        assert not end_ids & set(completion.token_ids)
        assert completion.text == ending.codec.text(completion.token_ids)
    for completion in completions:
        assert len(completion.logps) == len(completion.sampling_logps) == len(completion.token_ids)


def test_an_end_token_at_the_limit_is_an_end(ending: LoadedModel) -> None:
    for completion in (c for g in draws(ending, n=32, max_new_tokens=1) for c in g.completions):
        assert (completion.finish == "eos") == (completion.token_ids[0] in ending.codec.end_ids)


def test_min_new_tokens(ending: LoadedModel) -> None:
    completions = [c for g in draws(ending, n=16, min_new_tokens=7) for c in g.completions]
    assert all(not ending.codec.end_ids & set(c.token_ids[:7]) for c in completions)
    # The eighth may end it.
    assert min(len(c.token_ids) for c in completions) == 8


def test_a_stop_text_ends_a_completion_and_touches_no_other(ending: LoadedModel) -> None:
    free = draws(ending, n=16)
    letters = "".join(c.text for g in free for c in g.completions)
    stop = max("abcdefghijklmnopqrstuvwxyz0123456789", key=letters.count)
    stopped = draws(ending, n=16, stop=[stop])
    pairs = [
        (a, b)
        for x, y in zip(free, stopped, strict=True)
        for a, b in zip(x.completions, y.completions, strict=True)
    ]
    hits = [(a, b) for a, b in pairs if stop in a.text]
    assert 3 <= len(hits) < len(pairs)
    for without, with_stop in pairs:
        if stop not in without.text:
            assert with_stop == without
            continue
        assert with_stop.finish == "stop"
        assert with_stop.text == without.text.partition(stop)[0]
        # One byte a token: the stop text is complete with this very token.
        size = len(with_stop.token_ids)
        assert with_stop.token_ids == without.token_ids[:size]
        assert ending.codec.text(with_stop.token_ids) == with_stop.text + stop
        assert len(with_stop.logps) == len(with_stop.sampling_logps) == size
        assert with_stop.logps == pytest.approx(without.logps[:size], abs=1e-4)


@pytest.mark.parametrize(
    ("drawn", "stop", "text", "kept", "finish"),
    [
        ("ab\n\ncd", ("\n\n",), "ab", 4, "stop"),
        ("ab.c,d", (",", "."), "ab", 3, "stop"),
        ("abcdef", ("zz",), "abcdef", 6, "length"),
        (".abc", (".",), "", 1, "stop"),
        ("ab☕cd", ("☕",), "ab", 5, "stop"),  # three bytes are three tokens
        # A row that has stopped goes on drawing beside the others: what it draws then must not count.
        ("axENDy", ("END", "xENDy"), "ax", 5, "stop"),
        ("axEND<end>", ("END",), "ax", 5, "stop"),
        ("ab<end>c.", (".",), "ab", 3, "eos"),
    ],
)
def test_where_a_completion_is_cut(
    ending: LoadedModel, drawn: str, stop: tuple[str, ...], text: str, kept: int, finish: str
) -> None:
    ids = ending.codec.tokenizer(drawn, add_special_tokens=False)["input_ids"]
    numbers = [-float(i) for i in range(len(ids))]
    row = Row((0,), np.zeros(len(ids)), list(ids), numbers, numbers)
    cut = row.completion(ending.codec, Sampling(stop=stop), 0)
    assert cut == Completion(text, tuple(ids[:kept]), finish, 0)
    assert list(cut.logps) == list(cut.sampling_logps) == numbers[:kept]


# ---- limits ----------------------------------------------------------------------------------------


def test_a_prompt_without_room_is_named_before_anything_is_sampled(model: LoadedModel) -> None:
    room = model.codec.room(Prompt("x" * 100))
    long = Prompt("x" * 100, where="prompts.jsonl:7")
    assert len(draws(model, [long], n=1, max_new_tokens=room)[0].completions) == 1
    told: list[tuple[str, int]] = []
    with pytest.raises(DataError, match=rf"prompts\.jsonl:7.*no room for {room + 1} new"):
        sample(
            model,
            [Prompt("short"), long],
            1,
            Sampling(max_new_tokens=room + 1),
            seed=0,
            version=0,
            observe=lambda *what: told.append(what),
        )
    assert not told


def test_the_observer_is_told_of_every_token(model: LoadedModel) -> None:
    told: list[tuple[str, int]] = []
    sampling = Sampling(max_new_tokens=5, sampling_rows=3)
    groups = sample(model, PROMPTS, 2, sampling, seed=0, version=0, observe=lambda *what: told.append(what))
    assert {stage for stage, _ in told} == {"sample"}
    assert len(told) > 2  # not all at once: progress is shown as it is made
    assert sum(amount for _, amount in told) == sum(map(len, tokens(groups)))


# ---- chunks and the journal ------------------------------------------------------------------------

MANY = [Prompt("x" * (i % 5) + str(i)) for i in range(11)]  # of several lengths, in no order of them


def full(groups: list[Group]) -> list[tuple]:
    """All of it, to the last bit: completions are equal without their log-probabilities."""
    return [
        (g.prompt.text, c.text, c.token_ids, c.finish, c.policy_version, c.logps, c.sampling_logps)
        for g in groups
        for c in g.completions
    ]


def kept(model: LoadedModel, journal: Journal | None, prompts=MANY, **options) -> list[Group]:
    more = {
        key: options.pop(key) for key in ("seed", "version", "name", "observe", "purpose") if key in options
    }
    sampling = Sampling(**{"max_new_tokens": 5, "sampling_rows": 2, "temperature": 0.7} | options)
    return sample(model, prompts, 2, sampling, memory=journal, **{"seed": 0, "version": 3} | more)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal.db")
    yield made
    made.close()


def keys(journal: Journal) -> list[str]:
    return [key for (key,) in journal._db.execute("SELECT key FROM chunks ORDER BY rowid")]


def test_with_and_without_a_journal_the_same_comes_out(model: LoadedModel, journal: Journal) -> None:
    plain = kept(model, None)
    assert full(kept(model, journal)) == full(plain)
    told: list[tuple[str, int]] = []
    assert full(kept(model, journal, observe=lambda *what: told.append(what))) == full(plain)
    assert told == []  # nothing has been sampled again
    # Four times the two rows, at two completions a prompt, are four prompts a chunk.
    assert len(keys(journal)) == 3
    assert [g.prompt for g in plain] == MANY


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_only_the_chunk_that_is_missing_is_sampled_again(
    model: LoadedModel, journal: Journal, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = kept(model, None)
    real, left = Journal.keep_completions, cut

    def cut_off(self: Journal, *chunk, **options) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        real(self, *chunk, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep_completions", cut_off)
        with pytest.raises(KeyboardInterrupt):
            kept(model, journal)
    assert len(keys(journal)) == cut
    told: list[int] = []
    assert full(kept(model, journal, observe=lambda stage, amount: told.append(amount))) == full(expected)
    sizes = sorted(range(len(MANY)), key=lambda i: len(model.codec.prompt_ids(MANY[i])))
    missing = [c for i in sizes[4 * cut :] for c in expected[i].completions]
    assert sum(told) == sum(len(c.token_ids) for c in missing)


def test_a_purpose_has_chunks_of_its_own(model: LoadedModel, journal: Journal) -> None:
    answers = full(kept(model, journal))
    verdicts = full(kept(model, journal, purpose="verdict"))
    assert verdicts == answers  # the same draws, whatever they are for
    assert len(list(journal.table())) == len(list(journal.table("verdict"))) == len(answers)
    assert full(kept(model, journal, purpose="verdict")) == answers
    assert len(list(journal.table("verdict"))) == len(answers)


def test_a_chunk_that_is_lost_comes_out_the_same(model: LoadedModel, journal: Journal) -> None:
    expected = full(kept(model, journal))
    first = keys(journal)
    for table in ("chunks WHERE key", "completions WHERE chunk"):
        journal._db.execute(f"DELETE FROM {table} = ?", (first[1],))
    assert full(kept(model, journal)) == expected
    assert sorted(keys(journal)) == sorted(first)


def test_how_many_rows_are_sampled_together_changes_no_token(model: LoadedModel, journal: Journal) -> None:
    few, many = kept(model, journal, sampling_rows=1), kept(model, journal, sampling_rows=64)
    assert few == many == kept(model, None)
    assert len(keys(journal)) > 4  # but what comes back to the last bit is a chunk of the same prompts


@pytest.mark.parametrize(("first", "later"), [(2, 64), (2, None), (None, 2)])
def test_other_rows_find_the_chunks_of_the_first_start(
    model: LoadedModel, journal: Journal, first: int | None, later: int | None
) -> None:
    expected = full(kept(model, journal, sampling_rows=first))
    stored = keys(journal)
    resumed = replace(model, chunk_rows=first or 0)
    assert full(kept(resumed, journal, sampling_rows=later)) == expected
    assert keys(journal) == stored


def test_anything_else_is_not_taken_from_the_journal(model: LoadedModel, journal: Journal) -> None:
    few = MANY[:3]
    changes: list[dict] = [
        *[{}, {"seed": 1}, {"version": 4}, {"name": "other"}, {"temperature": 0.8}, {"max_new_tokens": 6}],
        *[{"top_k": 3}, {"stop": ["a"]}, {"prompts": MANY[1:3]}, {"prompts": MANY[:4]}],
    ]
    for count, change in enumerate(changes, 1):
        options = {"prompts": few} | change
        assert full(kept(model, journal, **options)) == full(kept(model, None, **options))
        assert len(keys(journal)) == count


def test_repeated_prompts_are_kept_apart(model: LoadedModel, journal: Journal) -> None:
    prompts = [Prompt("Hello")] * 9 + [Prompt("?")] + [Prompt("Hello")] * 2
    first = kept(model, journal, prompts)
    assert len(set(tokens(first))) == 24
    assert full(kept(model, journal, prompts)) == full(first) == full(kept(model, None, prompts))


def test_columns_of_a_prompt_are_those_of_now(model: LoadedModel, journal: Journal) -> None:
    kept(model, journal, [Prompt("Q", {"wanted": "old"})])
    (group,) = kept(model, journal, [Prompt("Q", {"wanted": "new"}, "d.jsonl:3")])
    assert (group.prompt.columns, group.prompt.where) == ({"wanted": "new"}, "d.jsonl:3")
    assert len(keys(journal)) == 1


# ---- Rows in parallel ------------------------------------------------------------------------------


def test_pools_of_candidates_sample_more_rows_within_a_bound(model: LoadedModel) -> None:
    config = model.network.config
    assert parallel_rows(config, 2, 100) == FEW_ROWS
    assert parallel_rows(config, 64, 100) == MOST_ROWS
    assert parallel_rows(config, 64, 10**9) == FEW_ROWS
    row = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    between = MOST_BYTES // (row * 150)  # room for 150 rows
    assert parallel_rows(config, 64, between) == 128
