import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from palate.config import Sampling
from palate.model.sampling import Barred, choose, draw, restricted_logps, row_uniforms

ROWS, VOCABULARY = 3, 40

OPTIONS = [
    {},
    {"temperature": 0.3},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.6},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3},
]


def random_logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def theirs(logits: Tensor, sampling: Sampling, ids: Tensor) -> Tensor:
    """What transformers' own processors leave, in the order of its `generate`."""
    steps = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        steps.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        steps.append(MinPLogitsWarper(sampling.min_p))
    return steps(ids, logits).log_softmax(-1)


def seen_of(ids: Tensor) -> Tensor:
    return torch.zeros(ROWS, VOCABULARY, dtype=torch.bool).scatter(1, ids, True)


# ---- restricted_logps ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_transformers_processors(options: dict) -> None:
    sampling = Sampling(**options)
    for seed in range(30):
        logits = random_logits(seed)
        ids = torch.randint(VOCABULARY, (ROWS, 6), generator=torch.Generator().manual_seed(seed))
        expected = theirs(logits, sampling, ids)
        got = restricted_logps(logits, sampling, seen=seen_of(ids))
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=30),
    temperature=st.sampled_from([0.0, 0.01, 0.5, 1.0, 3.0]),
    top_k=st.integers(0, 40),
    top_p=st.floats(1e-9, 1.0),
    min_p=st.floats(0.0, 1.0),
    repetition_penalty=st.floats(0.1, 10.0),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_a_distribution_on_allowed_tokens_whatever_the_options(logits, data, **options) -> None:
    size = len(logits)
    booleans = st.lists(st.booleans(), min_size=size, max_size=size)
    seen = torch.tensor([data.draw(booleans)])
    # One token is always free: an engine bars the end tokens only.
    barred = torch.tensor([[False, *data.draw(booleans)[1:]]])
    row = restricted_logps(torch.tensor([logits]), Sampling(**options), seen=seen, barred=barred)[0]
    kept = row > -math.inf
    assert kept.any()
    assert not (kept & barred[0]).any()
    assert not row.isnan().any()
    assert float(row.double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_without_options_it_is_the_model() -> None:
    logits = random_logits(0)
    assert torch.equal(restricted_logps(logits, Sampling()), logits.log_softmax(-1))


def test_temperature_zero_is_the_first_of_the_likeliest() -> None:
    # Restrictions keep the likeliest token, so that they change nothing here; barred tokens do.
    logits = torch.tensor([[1.0, 4.0, 4.0, -2.0], [0.0, -1.0, -3.0, -1.0]])
    sampling = Sampling(temperature=0, top_k=2, top_p=0.5, min_p=0.3)
    assert restricted_logps(logits, sampling).tolist() == [
        [-math.inf, 0.0, -math.inf, -math.inf],
        [0.0, -math.inf, -math.inf, -math.inf],
    ]
    barred = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert restricted_logps(logits, sampling, barred=barred).argmax(-1).tolist() == [0, 1]


def test_temperature_zero_takes_the_penalty_into_account() -> None:
    logits = torch.tensor([[4.0, 3.0]])
    seen = torch.tensor([[True, False]])
    assert restricted_logps(logits, Sampling(temperature=0, repetition_penalty=2.0), seen=seen).argmax() == 1


def test_ties_at_the_border_of_top_k_all_stay() -> None:
    # As in transformers: which of two equals goes would depend on their place in the vocabulary.
    row = restricted_logps(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), Sampling(top_k=2))[0]
    assert row.isfinite().tolist() == [True, True, True, False]


def test_ties_at_the_border_of_top_p_leave_the_fewest() -> None:
    # A quarter each: two of them have the half that is asked for.
    row = restricted_logps(torch.zeros(1, 4), Sampling(top_p=0.5))[0]
    assert int(row.isfinite().sum()) == 2
    assert row.exp().max() == pytest.approx(0.5)


def test_top_p_takes_the_token_that_reaches_the_share() -> None:
    # 0.5 and 0.3 together first reach 0.6.
    row = restricted_logps(torch.tensor([[0.2, 0.5, 0.3]]).log(), Sampling(top_p=0.6))[0]
    torch.testing.assert_close(row.exp(), torch.tensor([0.0, 0.625, 0.375]))


def test_min_p_is_a_share_of_the_likeliest() -> None:
    # 0.5 x 0.4 = 0.2: 0.25 stays, 0.15 and 0.1 go.
    row = restricted_logps(torch.tensor([[0.1, 0.25, 0.5, 0.15]]).log(), Sampling(min_p=0.4))[0]
    torch.testing.assert_close(row.exp(), torch.tensor([0.0, 1 / 3, 2 / 3, 0.0]))


def test_later_restrictions_see_what_earlier_ones_left() -> None:
    # Top-k leaves 0.5 and 0.3, of which 0.5 has 0.625 >= 0.6 alone; of the whole it has not.
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    kept = restricted_logps(logits, Sampling(top_k=2, top_p=0.6)).isfinite()[0]
    assert kept.tolist() == [True, False, False]


def test_a_row_does_not_depend_on_the_others() -> None:
    sampling = Sampling(**OPTIONS[-1])
    logits, ids = random_logits(1), torch.tensor([[1, 2], [3, 4], [5, 6]])
    seen = seen_of(ids)
    together = restricted_logps(logits, sampling, seen=seen)
    for i in range(ROWS):
        alone = restricted_logps(logits[i : i + 1], sampling, seen=seen[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)


def test_the_logits_are_left_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    barred = torch.zeros_like(logits, dtype=torch.bool)
    restricted_logps(logits, Sampling(**OPTIONS[-1]), seen=~barred, barred=barred)
    assert torch.equal(logits, before)


# ---- draw ------------------------------------------------------------------------------------------

PROBS = np.array([0.32, 0.02, 0.0, 0.21, 0.11, 0.05, 0.29])


def counted(logps: Tensor, uniforms: np.ndarray) -> np.ndarray:
    """How often each token is drawn from one row; in portions that stay in the processor's cache."""
    portions = torch.from_numpy(uniforms).split(500)
    tokens = torch.cat([draw(logps.exp().expand(len(some), -1), some) for some in portions])
    return np.bincount(tokens.numpy(), minlength=logps.shape[-1])


def restricted_by_hand(options: dict) -> np.ndarray:
    """The distribution that the options leave of `PROBS`, in float64 and without logits."""
    p = PROBS.copy()
    if "barred" in options:
        p[options["barred"]] = 0
    p = p ** (1 / options.get("temperature", 1.0))
    p /= p.sum()
    order = np.argsort(-p)
    if "top_k" in options:
        p[order[options["top_k"] :]] = 0
    if "top_p" in options:
        p /= p.sum()
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= options["top_p"]]] = 0
    if "min_p" in options:
        p[p < options["min_p"] * p.max()] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.5},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"barred": [0]},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(options: dict) -> None:
    draws = 100_000
    expected = restricted_by_hand(options)
    sampling = Sampling(**{k: v for k, v in options.items() if k != "barred"})
    barred = torch.zeros(1, len(PROBS), dtype=torch.bool)
    barred[0, options.get("barred", [])] = True
    logits = torch.from_numpy(np.log(np.maximum(PROBS, 1e-300))).float()[None]
    logps = restricted_logps(logits, sampling, barred=barred)
    counts = counted(logps, row_uniforms(1, "p", 0, 0, draws))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert scipy.stats.chisquare(counts[possible], draws * expected[possible]).pvalue > 1e-3


def test_draws_follow_the_repetition_penalty() -> None:
    # Logits 1 and -1 were seen: halved and doubled. p is proportional to e^(0.5, -2, 1, -1).
    logits = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    seen = torch.tensor([[True, True, False, False]])
    logps = restricted_logps(logits, Sampling(repetition_penalty=2.0), seen=seen)
    expected = np.exp([0.5, -2.0, 1.0, -1.0])
    counts = counted(logps, row_uniforms(2, "p", 0, 0, 100_000))
    assert scipy.stats.chisquare(counts, 100_000 * expected / expected.sum()).pvalue > 1e-3


LAST_BELOW_ONE = 1 - 2**-53


@pytest.mark.parametrize(
    ("size", "first", "second"), [(7, 2, 4), (1000, 300, 400), (1000, 300, 600), (512, 256, 511)]
)
def test_the_edges_of_the_uniform_number_never_meet_an_impossible_token(
    size: int, first: int, second: int
) -> None:
    # Impossible tokens at both ends: u = 0 must step over the first ones, u -> 1 must stop before the last,
    # and neither may be lost in a whole block of them.
    logps = torch.full((1, size), -torch.inf)
    logps[0, [first, second]] = math.log(0.5)
    for u, token in [(0.0, first), (5e-324, first), (0.49, first), (0.51, second), (LAST_BELOW_ONE, second)]:
        assert draw(logps.exp(), torch.tensor([u], dtype=torch.float64)).item() == token


@pytest.mark.parametrize("size", [5, 256, 257, 3000])
def test_the_draw_inverts_the_cumulative_distribution(size: int) -> None:
    # In blocks or not, a number in [0, 1) means the same token.
    logits = 3 * torch.randn(500, size, generator=torch.Generator().manual_seed(size))
    logps = restricted_logps(logits, Sampling(top_p=0.98))
    uniforms = row_uniforms(3, "p", 0, 0, 500)
    cumulative = np.cumsum(logps.double().exp().numpy(), axis=-1)
    expected = [
        np.searchsorted(c, u * c[-1], side="right") for c, u in zip(cumulative, uniforms, strict=True)
    ]
    assert draw(logps.exp(), torch.from_numpy(uniforms)).tolist() == expected


@pytest.mark.parametrize("size", [3, 1000, 49_152])
def test_no_gap_above_the_last_token(size: int) -> None:
    # Float32 rows sum to a little less or more than one; u -> 1 still has to land on a token with mass.
    logits = 4 * torch.randn(20, size, generator=torch.Generator().manual_seed(size))
    logps = restricted_logps(logits, Sampling(top_k=size // 2))
    for u in (0.0, LAST_BELOW_ONE):
        tokens = draw(logps.exp(), torch.full((20,), u, dtype=torch.float64))
        assert logps.gather(1, tokens[:, None]).isfinite().all()


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_impossible_tokens_are_never_drawn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 50, generator=generator)
    logits[torch.rand(64, 50, generator=generator) < 0.8] = -torch.inf
    logits[:, 17] = 0.0  # every row keeps something
    tokens = draw(logits.softmax(-1), torch.rand(64, dtype=torch.float64, generator=generator))
    assert logits.gather(1, tokens[:, None]).isfinite().all()


def test_a_certain_token_is_drawn_with_any_number() -> None:
    logps = torch.full((3, 4), -torch.inf)
    logps[:, 2] = 0.0
    uniforms = torch.tensor([0.0, 0.5, LAST_BELOW_ONE], dtype=torch.float64)
    assert draw(logps.exp(), uniforms).tolist() == [2, 2, 2]


# ---- row_uniforms ----------------------------------------------------------------------------------


def test_uniforms_are_a_pure_function_of_their_key() -> None:
    state = np.random.get_state()[1].copy(), torch.random.get_rng_state()
    first = row_uniforms(3, "ab", 1, 2, 50)
    assert np.array_equal(first, row_uniforms(3, "ab", 1, 2, 50))
    # Nothing global was read or moved.
    assert np.array_equal(state[0], np.random.get_state()[1])
    assert torch.equal(state[1], torch.random.get_rng_state())


def test_a_longer_completion_starts_with_the_same_numbers() -> None:
    # So max_new_tokens cuts completions and does not change them.
    assert np.array_equal(row_uniforms(3, "ab", 1, 2, 50)[:10], row_uniforms(3, "ab", 1, 2, 10))


def test_numbers_stay_the_same_across_releases() -> None:
    # A resumed run must draw what the run that was cut would have drawn.
    expected = [0.1608619996515468, 0.7545578587857851, 0.9864297208548496]
    assert row_uniforms(0, "0123456789abcdef", 0, 0, 3).tolist() == expected


def test_every_part_of_the_key_counts() -> None:
    # (1, "1:1") and the like must not run together into one name.
    keys = [
        (seed, prompt, occurrence, sample)
        for seed in (0, 1, 11)
        for prompt in ("0", "1", "11", "a")
        for occurrence in (0, 1, 11)
        for sample in (0, 1, 11)
    ]
    assert len({row_uniforms(*key, 4).tobytes() for key in keys}) == len(keys)


def test_numbers_are_uniform_within_and_across_rows() -> None:
    within = row_uniforms(5, "p", 0, 0, 20_000)
    across = np.array([row_uniforms(5, "p", 0, j, 1)[0] for j in range(5_000)])
    for numbers in (within, across):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        assert scipy.stats.kstest(numbers, "uniform").pvalue > 1e-3
    # Neighbouring samples must not move together.
    pairs = np.stack([row_uniforms(5, "p", 0, j, 2_000) for j in range(2)])
    assert abs(np.corrcoef(pairs)[0, 1]) < 0.08


# ---- choose ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("gap", [0.0, 10.25, 12.0, 120.0])
def test_barred_tokens_change_nothing_among_the_others(temperature: float, gap: float) -> None:
    # However much likelier than all others they are: what is left must not have underflowed.
    logits = torch.tensor([[0.0, -0.05, -0.1, gap]]).expand(4000, -1).clone()
    sampling = Sampling(temperature=temperature)
    uniforms = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    barred = Barred(torch.ones(4000, dtype=torch.bool), torch.tensor([3]))
    tokens, logps, drawn = choose(logits, sampling, uniforms, barred=barred)
    wanted = restricted_logps(logits, sampling, barred=barred.mask(logits))[0]
    frequencies = torch.bincount(tokens, minlength=4) / 4000
    torch.testing.assert_close(frequencies, wanted.exp(), atol=1e-3, rtol=0)
    torch.testing.assert_close(drawn, wanted[tokens], atol=1e-5, rtol=0)
    torch.testing.assert_close(logps, logits[0].log_softmax(-1)[tokens], atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 0}])
def test_a_row_is_what_it_is_beside_rows_with_barred_tokens(options: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(6, 1000, generator=generator)
    before = logits.clone()
    sampling = Sampling.model_validate(options)
    uniforms = torch.rand(6, dtype=torch.float64, generator=generator)
    rows = torch.tensor([True, False] * 3)
    together = choose(logits, sampling, uniforms, barred=Barred(rows, torch.tensor([1, 7])))
    assert torch.equal(logits, before)
    assert not torch.isin(together[0][rows], torch.tensor([1, 7])).any()
    for i in range(6):
        own = Barred(rows[i : i + 1], torch.tensor([1, 7])) if rows[i] else None
        alone = choose(logits[i : i + 1], sampling, uniforms[i : i + 1], barred=own)
        assert [t[i].item() for t in together] == pytest.approx([t.item() for t in alone], abs=1e-6)
        if not rows[i]:
            assert [t[i].item() for t in together] == [t.item() for t in alone]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("barred", [None, Barred(torch.tensor([True, False, True]), torch.tensor([0, 3]))])
def test_overwritten_logits_give_the_same_draws(options: dict[str, float], barred: Barred | None) -> None:
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(0)) * 3
    sampling, uniforms = Sampling(**options), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    kept = logits.clone()
    wanted = choose(logits, sampling, uniforms, barred=barred)
    assert logits.equal(kept)
    for ours, theirs in zip(
        choose(logits, sampling, uniforms, barred=barred, overwrite=True), wanted, strict=True
    ):
        assert ours.equal(theirs)
