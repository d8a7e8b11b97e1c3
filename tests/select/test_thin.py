import itertools
import math
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palate.select import (
    Drop,
    Thinned,
    above_threshold,
    distinct,
    rejection_sample,
    select_completions,
    top_k,
)
from palate.types import Completion, Group, Prompt

Rewards = Sequence[float | None]

REWARD = st.one_of(st.none(), st.sampled_from([-1.0, 0.0, 0.5, 2.0, math.nan, math.inf]))
REWARDS = st.lists(REWARD, max_size=6)


def completion(text: str) -> Completion:
    """Its tokens are its characters."""
    return Completion(text, tuple(map(ord, text)))


def group(texts: str, rewards: Rewards | None = None) -> Group:
    """A group with a completion for each letter."""
    completions = tuple(map(completion, texts))
    return Group(
        Prompt("Q", where="prompts.jsonl:12"), completions, None if rewards is None else tuple(rewards)
    )


def lettered(rewards: Rewards) -> Group:
    return group("abcdef"[: len(rewards)], rewards)


def texts(of: Group) -> str:
    return "".join(c.text for c in of.completions)


def usable(rewards: Rewards) -> list[float]:
    return [r for r in rewards if r is not None and math.isfinite(r)]


RULES: dict[str, Callable[[Group], Group]] = {
    "above": lambda g: above_threshold(g, 0.0),
    "top": lambda g: top_k(g, 2),
    "sample": lambda g: rejection_sample(g, 2, beta=0.5, rng=Random(3)),
}
ALL = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)

# ---- Every rule ------------------------------------------------------------------------------------


@ALL
def test_rewards_and_parts_stay_with_their_completions(rule: Callable[[Group], Group]) -> None:
    rewards = (0.5, None, 3.0, -2.0, 1.0)
    before = group("abcde", rewards).annotated(rewards, twice=(1.0, None, 6.0, -4.0, 2.0))
    after = rule(before)
    assert 2 <= len(after.completions) < 5
    assert after.prompt is before.prompt
    assert after.rewards == tuple(rewards["abcde".index(text)] for text in texts(after))
    assert after.parts == {"twice": tuple(2 * r for r in usable(after.rewards))}
    assert before.completions == group("abcde").completions


@ALL
@given(rewards=REWARDS)
def test_unusable_ones_are_never_kept(rule: Callable[[Group], Group], rewards: Rewards) -> None:
    after = rule(lettered(rewards))
    assert after.rewards is not None
    assert usable(after.rewards) == list(after.rewards)


@ALL
def test_group_without_rewards_is_an_error(rule: Callable[[Group], Group]) -> None:
    with pytest.raises(ValueError, match=r"the group of prompt prompts.jsonl:12 has no rewards: annotate it"):
        rule(group("ab"))
    with pytest.raises(ValueError, match=Prompt("Q").id):  # named by its key where nothing else is known
        rule(Group(Prompt("Q"), (completion("a"),)))


@ALL
@pytest.mark.parametrize("rewards", [[], [None, math.nan]])
def test_nothing_usable_leaves_an_empty_group(rule: Callable[[Group], Group], rewards: Rewards) -> None:
    after = rule(lettered(rewards))
    assert (after.completions, after.rewards) == ((), ())


@pytest.mark.parametrize("k", [0, -1])
def test_k_is_at_least_one(k: int) -> None:
    with pytest.raises(ValueError, match=f"k is {k}, expected at least 1 completion"):
        top_k(lettered([1.0, 2.0]), k)
    with pytest.raises(ValueError, match=f"k is {k}, expected at least 1 completion"):
        rejection_sample(lettered([1.0, 2.0]), k, beta=0.5, rng=Random(0))


# ---- distinct, above_threshold, top_k --------------------------------------------------------------


def test_distinct_keeps_the_first_of_same_tokens_or_text() -> None:
    completions = (
        Completion("yes", (1, 2)),
        Completion(" yes\n", (3, 2)),  # the same text in other tokens
        Completion("no", (4,)),
        Completion("cut", (4,), finish="length"),  # the same tokens decide as well
        Completion("ye s", (5,)),
    )
    after = distinct(Group(Prompt("Q"), completions, (0.0, 1.0, None, 3.0, 4.0)))
    assert after.completions == (completions[0], completions[2], completions[4])
    assert after.rewards == (0.0, None, 4.0)


def test_distinct_needs_no_rewards() -> None:
    assert distinct(group("abab")) == group("ab")
    assert distinct(group("")) == group("")


def test_above_threshold_keeps_order_and_leaves_out_the_threshold() -> None:
    assert texts(above_threshold(lettered([0.7, 0.9, 0.70001, 0.1, 0.8]), 0.7)) == "bce"
    assert texts(above_threshold(group("aab", [1.0, 2.0, 0.0]), 0.5)) == "aa"  # repetitions too
    assert texts(above_threshold(lettered([0.7, -9.0]), -math.inf)) == "ab"
    with pytest.raises(ValueError, match="tau is not a number"):
        above_threshold(lettered([1.0]), math.nan)


def test_top_k_from_the_best_down() -> None:
    assert texts(top_k(lettered([0.0, 3.0, None, 1.0, 2.0]), 3)) == "bed"
    assert texts(top_k(lettered([0.0, 3.0]), 5)) == "ba"
    assert texts(top_k(lettered([1.0, 2.0, 1.0, 2.0]), 3)) == "bda"  # the first of equals


def test_top_k_counts_a_repeated_text_once_and_by_its_first_reward() -> None:
    assert texts(top_k(group("abab", [1.0, 2.0, 9.0, 3.0]), 3)) == "ba"
    # One without usable reward is no candidate, so it does not stand in the way of its repetition.
    assert texts(top_k(group("aab", [None, 3.0, 2.0]), 2)) == "ab"


# ---- rejection_sample: closed forms ----------------------------------------------------------------


def chi_square(found: Counter[str], expected: dict[str, float], draws: int) -> float:
    """The p-value; outcomes expected fewer than 10 times are counted together."""
    assert found.keys() <= {outcome for outcome, p in expected.items() if p > 0}
    rare = [o for o, p in expected.items() if p * draws < 10]
    cells = [(found[o], p * draws) for o, p in expected.items() if o not in rare]
    if rare:
        cells.append((sum(found[o] for o in rare), sum(expected[o] for o in rare) * draws))
    observed, awaited = zip(*[cell for cell in cells if cell[1] > 0], strict=True)
    return float(stats.chisquare(observed, awaited).pvalue)


class InOrder(Random):
    """Leaves candidates in the group's order: its first n numbers, by which they are shuffled, rise."""

    def start(self, n: int) -> Random:
        self.keys = [i / n for i in range(n)]
        return self

    def random(self) -> float:
        return self.keys.pop(0) if self.keys else super().random()


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_one_sweep_accepts_each_with_its_probability(beta: float) -> None:
    # The best comes last and is always accepted, so the ones before it are those that the first sweep took,
    # each independently with exp((r - 2)/beta).
    rewards, n = [1.0, 0.0, -1.0, 2.0], 100_000
    chances = {text: math.exp((r - 2.0) / beta) for text, r in zip("abc", rewards, strict=False)}
    rng, candidates = InOrder(11), lettered(rewards)
    found = Counter(
        texts(rejection_sample(candidates, 4, beta=beta, rng=rng.start(4))).split("d")[0] for _ in range(n)
    )
    subsets = ["".join(c) for size in range(4) for c in itertools.combinations("abc", size)]
    expected = {s: math.prod(p if t in s else 1 - p for t, p in chances.items()) for s in subsets}
    assert chi_square(found, expected, n) > 1e-3
    for text, p in chances.items():
        times = sum(count for subset, count in found.items() if text in subset)
        assert stats.binomtest(times, n, p).pvalue > 1e-3


def exact(rewards: dict[str, float], k: int, beta: float) -> dict[str, float]:
    """Probability of each order of acceptance: all shuffles, and both outcomes of every draw, written out."""
    total: Counter[str] = Counter()

    def draw(waiting: str, i: int, highest: float, accepted: str, p: float) -> None:
        if len(accepted) == k or not waiting:
            total[accepted] += p
        elif i == len(waiting):
            draw(waiting, 0, max(rewards[t] for t in waiting), accepted, p)
        else:
            text = waiting[i]
            chance = math.exp((rewards[text] - highest) / beta)
            # An accepted one is waiting no longer, but this sweep's highest reward stays.
            if len(waiting) == 1:
                total[accepted + text] += p * chance
            else:
                draw(waiting[:i] + waiting[i + 1 :], i, highest, accepted + text, p * chance)
            if chance < 1:
                draw(waiting, i + 1, highest, accepted, p * (1 - chance))

    orders = list(itertools.permutations(rewards))
    for order in orders:
        draw("".join(order), 0, max(rewards.values()), "", 1 / len(orders))
    return dict(total)


@pytest.mark.parametrize(
    ("rewards", "k", "beta"),
    [
        ([1.0, 0.2, 0.0], 2, 1.0),
        ([1.0, 1.0, 0.3, -0.4], 2, 0.8),
        ([0.5, 0.0, 0.1], 3, 0.4),
        ([2.0, 0.0], 1, 3.0),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])  # candidates' order in the group does not matter
def test_orders_of_acceptance_follow_the_exact_law(
    rewards: list[float], k: int, beta: float, backwards: bool
) -> None:
    law = exact(dict(zip("abcd", rewards, strict=False)), k, beta)
    assert sum(law.values()) == pytest.approx(1, abs=1e-9)
    candidates = lettered(rewards)
    if backwards:
        candidates = group(texts(candidates)[::-1], rewards[::-1])
    rng, n = Random(12), 20_000
    found = Counter(texts(rejection_sample(candidates, k, beta=beta, rng=rng)) for _ in range(n))
    assert chi_square(found, law, n) > 1e-3


@pytest.mark.parametrize("beta", [math.inf, 1e12])
def test_large_beta_is_a_uniform_draw_without_replacement(beta: float) -> None:
    rng, n = Random(13), 20_000
    candidates = lettered([5.0, -3.0, 0.0, 900.0])
    found = Counter(texts(rejection_sample(candidates, 2, beta=beta, rng=rng)) for _ in range(n))
    law = {"".join(two): 1 / 12 for two in itertools.permutations("abcd", 2)}
    assert chi_square(found, law, n) > 1e-3


# ---- rejection_sample: guards ----------------------------------------------------------------------


@given(rewards=REWARDS, k=st.integers(1, 7))
def test_beta_of_zero_is_exactly_top_k(rewards: Rewards, k: int) -> None:
    rng = Random(0)
    before = rng.getstate()
    assert rejection_sample(lettered(rewards), k, beta=0.0, rng=rng) == top_k(lettered(rewards), k)
    assert rng.getstate() == before


@given(rewards=REWARDS, k=st.integers(1, 7), seed=st.integers(0, 99))
def test_towards_zero_it_comes_to_the_highest_rewards(rewards: Rewards, k: int, seed: int) -> None:
    made = rejection_sample(lettered(rewards), k, beta=1e-300, rng=Random(seed))
    assert made.rewards == top_k(lettered(rewards), k).rewards


class Counted(Random):
    """Counts its numbers; beyond the first n, by which candidates are shuffled, they reject all they can."""

    def start(self, n: int) -> "Counted":
        self.calls, self.n = 0, n
        return self

    def random(self) -> float:
        self.calls += 1
        return super().random() if self.calls <= self.n else math.nextafter(1.0, 0.0)


@pytest.mark.parametrize(("n", "k"), [(6, 1), (6, 4), (6, 6), (3, 5)])
def test_at_most_k_sweeps(n: int, k: int) -> None:
    # Every number is the largest below 1, so that a sweep accepts no more than the best one left: it asks
    # once for each of the n - i left in sweep i, but after the k-th acceptance no more.
    rng = Counted(14).start(n)
    made = rejection_sample(lettered([float(i) for i in range(n)]), k, beta=1.0, rng=rng)
    assert texts(made) == "abcdef"[:n][::-1][:k]
    sweeps = min(k, n)
    assert rng.calls - n <= sum(n - i for i in range(sweeps))
    assert rng.calls - n > sum(n - i for i in range(sweeps - 1))


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, math.inf])
@given(rewards=REWARDS, k=st.integers(1, 7), seed=st.integers(0, 99))
def test_as_many_as_asked_for_or_all(beta: float, rewards: Rewards, k: int, seed: int) -> None:
    made = rejection_sample(lettered(rewards), k, beta=beta, rng=Random(seed))
    assert len(set(texts(made))) == len(made.completions) == min(k, len(usable(rewards)))


def test_repetitions_collapse_and_fewer_than_k_are_all_returned() -> None:
    repeated = group("abaab", [1.0, 2.0, 3.0, None, 4.0])
    for seed in range(20):
        made = rejection_sample(repeated, 4, beta=0.5, rng=Random(seed))
        assert sorted(zip(texts(made), made.rewards or (), strict=True)) == [("a", 1.0), ("b", 2.0)]


def test_equal_rewards_are_all_accepted_in_one_sweep() -> None:
    rng = Counted(15).start(5)
    made = rejection_sample(lettered([7.0] * 5), 5, beta=0.01, rng=rng)
    assert len(made.completions) == 5
    assert rng.calls == 10  # five to shuffle, five to accept
    first = Counter(texts(rejection_sample(lettered([7.0] * 4), 1, beta=0.01, rng=rng.start(4)))
                    for _ in range(4000))  # fmt: skip
    assert chi_square(first, dict.fromkeys("abcd", 0.25), 4000) > 1e-3


def test_one_seed_one_result() -> None:
    candidates = lettered([0.0, 0.3, 0.1, 0.4, 0.2, 0.5])

    def run(seed: int) -> list[str]:
        rng = Random(seed)
        return [texts(rejection_sample(candidates, 3, beta=0.3, rng=rng)) for _ in range(5)]

    # Recorded: the same numbers must follow from a seed in every version of Python.
    assert run(1) == run(1) == ["feb", "ecd", "fbd", "cef", "dfb"]
    assert run(1) != run(2)


@pytest.mark.parametrize("beta", [-0.1, math.nan])
def test_beta_is_not_negative(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta is {beta}, expected a number, 0 or above"):
        rejection_sample(lettered([1.0, 2.0]), 1, beta=beta, rng=Random(0))


# ---- select_completions ----------------------------------------------------------------------------


def drops(**counts: int) -> dict[Drop, int]:
    return dict.fromkeys(Drop, 0) | {Drop(reason): count for reason, count in counts.items()}


def test_select_keeps_groups_in_order_and_counts_what_is_left_out() -> None:
    groups = [
        group("abacd", [1.0, 2.0, 3.0, None, 0.0]),  # b and the first a; the other a repeats it
        group("e", [None]),
        group("fg", [1.0, 0.0]),
    ]
    thinned = select_completions(iter(groups), lambda g: top_k(g, 2))
    assert [texts(g) for g in thinned.groups] == ["ba", "fg"]
    assert thinned.dropped == drops(identical=1, unusable=2, passed_over=1)
    assert pickle.loads(pickle.dumps(thinned)) == thinned


def test_select_without_rewards() -> None:
    a = completion("a")
    twice = Group(Prompt("Q"), (a, a, completion("b")))  # one object at two places
    assert select_completions([twice], distinct) == Thinned((group("ab"),), drops(identical=1))


def test_select_of_nothing_counts_zero_of_every_reason() -> None:
    assert select_completions([], distinct) == Thinned((), drops())


@given(texts_of_group=st.text("abc", max_size=6), rewards=st.lists(REWARD, min_size=6, max_size=6))
@ALL
def test_every_completion_is_kept_or_counted(
    rule: Callable[[Group], Group], texts_of_group: str, rewards: list[float | None]
) -> None:
    thinned = select_completions([group(texts_of_group, rewards[: len(texts_of_group)])], rule)
    kept = sum(len(g.completions) for g in thinned.groups)
    assert kept + sum(thinned.dropped.values()) == len(texts_of_group)
    assert all(g.completions for g in thinned.groups)
