"""Annotators: whatever says which completions are good."""

from palate.annotate.base import Annotator, Judge, Scorer, judged, penalised, scored
from palate.annotate.function import FunctionScorer, load_function
from palate.annotate.ranker import Ranker, against_first, labels, question
from palate.annotate.reward_model import RewardModel
from palate.annotate.rules import Rule, length, regex, sentiment
from palate.annotate.spec import annotator, files_of, scorer

__all__ = [
    "Annotator",
    "FunctionScorer",
    "Judge",
    "Ranker",
    "RewardModel",
    "Rule",
    "Scorer",
    "against_first",
    "annotator",
    "files_of",
    "judged",
    "labels",
    "length",
    "load_function",
    "penalised",
    "question",
    "regex",
    "scored",
    "scorer",
    "sentiment",
]
