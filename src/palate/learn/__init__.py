"""Learning: objectives, optimizer, learners and policies."""

from palate.learn.cringe import PairwiseCringe
from palate.learn.learner import Learner, Metrics, Policy
from palate.learn.likelihood import Anchored, Likelihood, anchors
from palate.learn.objective import CachedReference, Needs, Objective, Pairwise, Reference
from palate.learn.optim import Optimizer
from palate.learn.ranking import RankedGroups, Ranking

__all__ = [
    "Anchored",
    "CachedReference",
    "Learner",
    "Likelihood",
    "Metrics",
    "Needs",
    "Objective",
    "Optimizer",
    "Pairwise",
    "PairwiseCringe",
    "Policy",
    "RankedGroups",
    "Ranking",
    "Reference",
    "anchors",
]
