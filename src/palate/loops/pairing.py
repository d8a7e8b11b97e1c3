"""Pairs of candidates, and the anchors that stay likely while pairs are learnt."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from palate.annotate import Annotator
from palate.loops.config import Ask, Pairing
from palate.select import (
    Drop,
    Selected,
    all_pairs,
    best_vs_worst,
    first_round_pairs,
    pair_of_two,
    select_pairs,
    top_k,
    tournament_pairs,
)
from palate.types import AnchoredPair, Group, Pair


def paired(
    groups: Sequence[Group],
    annotate: Annotator,
    *,
    pairing: Pairing,
    ask: Ask = "scores",
    tie: float,
    rng: Random,
) -> Selected:
    """Form pairs of the completions of each group.

    Args:
        groups: groups, with rewards unless `ask` is "comparisons".
        annotate: compares the two completions of each match if `ask` is "comparisons"; otherwise unused.
        pairing: the rule that forms pairs; "comparisons" needs "tournament" or "first-round".
        ask: "scores" compares the rewards, "comparisons" asks the annotator.
        tie: largest reward difference that counts as a tie.
        rng: source of random draws.
    """
    decide: Annotator = list if ask == "scores" else annotate
    if pairing == "tournament":
        return tournament_pairs(groups, decide, rng=rng, tie=tie)
    if pairing == "first-round":
        twos = [two for group in groups for two in first_round_pairs(group, rng)]
        made = select_pairs(decide(twos) if twos else [], lambda two: pair_of_two(two, tie=tie))
        alone = sum(len(group.completions) for group in groups) - 2 * len(twos)
        return Selected(
            made.pairs, {**made.dropped, Drop.PASSED_OVER: made.dropped[Drop.PASSED_OVER] + alone}
        )
    assert ask == "scores", "configurations do not allow this pairing with comparisons"
    if pairing == "drawn":
        return select_pairs(groups, lambda group: drawn_pairs(group, tie=tie, rng=rng))
    return select_pairs(groups, lambda group: best_vs_worst(group, tie=tie))


def drawn_pairs(group: Group, *, tie: float, rng: Random) -> Selected:
    """Draw as many random pairs from a group as it has completions; the other pairs count as passed over."""
    made = all_pairs(group, tie=tie)
    order = sorted(made.pairs, key=lambda _: rng.random())  # only random() is stable across Pythons
    kept = tuple(order[: len(group.completions)])
    passed_over = made.dropped[Drop.PASSED_OVER] + len(made.pairs) - len(kept)
    return Selected(kept, {**made.dropped, Drop.PASSED_OVER: passed_over})


def with_best(pairs: Sequence[Pair], groups: Sequence[Group]) -> list[Pair | AnchoredPair]:
    """Return the pairs, each anchored at its group's best candidate unless that is its chosen completion.

    Args:
        pairs: pairs of the groups; the pairs of a tournament in order of play.
        groups: with rewards, the candidate with the highest reward is the best; without rewards, the winner
            of the last match that formed a pair is the best, since no candidate has beaten it.
    """
    best = {id(pair.prompt): pair.chosen for pair in pairs}
    highest = [top_k(group, 1) for group in groups if group.rewards is not None]
    best |= {id(group.prompt): group.completions[0] for group in highest if group.completions}
    return [p if p.chosen is best[id(p.prompt)] else AnchoredPair(p, best[id(p.prompt)]) for p in pairs]
