"""Annotators: whatever says which completions are good."""

from palate.annotate.base import Annotator, Judge, Scorer, judged, penalised, scored
from palate.annotate.function import FunctionScorer, load_function
from palate.annotate.reward_model import RewardModel
from palate.annotate.rules import Rule, length, regex, sentiment
from palate.annotate.spec import annotator, scorer

__all__ = [
    "Annotator",
    "FunctionScorer",
    "Judge",
    "RewardModel",
    "Rule",
    "Scorer",
    "annotator",
    "judged",
    "length",
    "load_function",
    "penalised",
    "regex",
    "scored",
    "scorer",
    "sentiment",
]
