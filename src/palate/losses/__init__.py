"""Losses: pure functions of tensors and floats, one number per example, unreduced."""

from palate.losses.pairwise import PAIR_LOSSES, PairLoss, dpo, hinge_norm, ipo, rso_hinge, slic_rank
from palate.losses.reward import bradley_terry
from palate.losses.token import nll

__all__ = [
    "PAIR_LOSSES",
    "PairLoss",
    "bradley_terry",
    "dpo",
    "hinge_norm",
    "ipo",
    "nll",
    "rso_hinge",
    "slic_rank",
]
