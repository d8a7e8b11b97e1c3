"""Losses: pure functions of tensors and floats, one number per example, unreduced."""

from palate.losses.cringe import cringe, pairwise_cringe
from palate.losses.group import rrhf
from palate.losses.pairwise import (
    PAIR_LOSSES,
    PairLoss,
    click,
    dpo,
    hinge_norm,
    ipo,
    rso_hinge,
    slic_rank,
)
from palate.losses.reward import bradley_terry, soft_preference
from palate.losses.token import nll

__all__ = [
    "PAIR_LOSSES",
    "PairLoss",
    "bradley_terry",
    "click",
    "cringe",
    "dpo",
    "hinge_norm",
    "ipo",
    "nll",
    "pairwise_cringe",
    "rrhf",
    "rso_hinge",
    "slic_rank",
    "soft_preference",
]
