"""Learning: objectives, optimizer, learners and policies."""

from palate.learn.learner import Learner, Metrics, Policy
from palate.learn.objective import CachedReference, Objective, Pairwise, Reference
from palate.learn.optim import Optimizer

__all__ = [
    "CachedReference",
    "Learner",
    "Metrics",
    "Objective",
    "Optimizer",
    "Pairwise",
    "Policy",
    "Reference",
]
