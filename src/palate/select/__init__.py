"""How groups of completions become pairs, or smaller groups, to learn from; what is left out is counted."""

from palate.select._group import same
from palate.select.pairs import (
    Drop,
    Rule,
    Selected,
    all_pairs,
    best_vs_worst,
    by_likelihood_rank,
    pair_of_two,
    select_pairs,
)
from palate.select.thin import (
    Thinned,
    above_threshold,
    distinct,
    rejection_sample,
    select_completions,
    top_k,
)
from palate.select.tournament import first_round_pairs, tournament_pairs

__all__ = [
    "Drop",
    "Rule",
    "Selected",
    "Thinned",
    "above_threshold",
    "all_pairs",
    "best_vs_worst",
    "by_likelihood_rank",
    "distinct",
    "first_round_pairs",
    "pair_of_two",
    "rejection_sample",
    "same",
    "select_completions",
    "select_pairs",
    "top_k",
    "tournament_pairs",
]
